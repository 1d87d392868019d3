"""Ferret's referring object classification on LVIS (You et al. 2023, arXiv 2310.07704, section 5.1), from
`lvis_eval.jsonl`.

Each line is an object: `image_path, width, height, name, synonyms, neg_class`, and three ways to point at it:
`bbox_norm` (xyxy in 0..1), `sample_point` (pixels), `free_shape_bbox_raw` (xyxy, pixels) with `free_shape_segment_mask`
(width x height, transposed as numpy goes).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ...mllm.boxes import Points
from ...train_stages.importers.fields import json_lines, need
from ...train_stages.masks import encode_mask
from ...vision_towers.errors import UserError
from ..more_rows import CLASSIFY_CHOICE, alternate, shape_box
from ..task_rows import NO_REGION, TaskRow
from .layout import FERRET_PAGE, need_file, need_folder


def reflvis_rows(root: Path, pointing: str) -> list[TaskRow]:
    """One row an object: "Is the object <region> of the image a X or a Y?", the true name first in even rows, as in
    Ferret's script.

    Args:
        root: data root (`layout`).
        pointing: "box", "point" (the 5 px box around it, as everywhere here) or "shape" (its box; a model that takes
            pictures only is shown the shape itself).

    Raises:
        Absent: there is no folder `reflvis`.
        UserError: its file is missing, or a line of it is not of this form.
    """
    path = need_file(need_folder(root / "reflvis", FERRET_PAGE) / "lvis_eval.jsonl", FERRET_PAGE)
    rows = []
    for label, item in json_lines(path):
        try:
            if isinstance(item, ValueError):
                raise item
            rows.append(_row(root, item, pointing))
        except (ValueError, TypeError, IndexError) as error:
            raise UserError(f"{path}: {label} cannot be used ({error}); get the file from {FERRET_PAGE}.") from None
    return alternate(rows)


def _row(root: Path, item: Mapping[str, Any], pointing: str) -> TaskRow:
    width, height = need(item, "width", int), need(item, "height", int)
    name = Path(need(item, "image_path", str)).name
    norm = need(item, "bbox_norm", list)
    target = [float(norm[0]) * width, float(norm[1]) * height, float(norm[2]) * width, float(norm[3]) * height]
    prompt = target
    further: dict[str, Any] = {}
    if pointing == "point":
        x, y = (float(value) for value in need(item, "sample_point", list))
        (around,) = Points([[x, y]]).to_boxes().clip(width, height)
        prompt, further = list(around), {"point_xy": [x, y]}
    elif pointing == "shape":
        mask = np.asarray(need(item, "free_shape_segment_mask", list)).T.astype(bool)
        if mask.shape != (height, width) or not mask.any():
            raise ValueError(f"its shape is a mask of {mask.shape[::-1]}, not of {(width, height)}, or empty")
        prompt, further = shape_box(mask), {"shape": encode_mask(mask)["counts"]}
    true = _plain(need(item, "name", str))
    synonyms = [_plain(text) for text in item.get("synonyms", [])]
    return TaskRow(
        image=str(root.absolute() / "val2017" / name),
        width=width,
        height=height,
        image_id=name,
        region_index=NO_REGION,
        phrase="",
        question=CLASSIFY_CHOICE,
        prompt_boxes=[prompt],
        target_xyxy=target,
        answers=list(dict.fromkeys([true, *(part for text in synonyms for part in _parts(text))])),
        choices=[true, _plain(need(item, "neg_class", str))],
        **further,
    )


def _plain(name: str) -> str:
    return name.replace("_", " ").strip()


def _parts(synonym: str) -> list[str]:
    """LVIS writes what a word means in brackets: "bow (weapon)" is accepted as either part."""
    return [part for part in (piece.strip(" )") for piece in synonym.split("(")) if part]
