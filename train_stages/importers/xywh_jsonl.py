"""Importer `xywh_jsonl`: one JSON object per image and line, with boxes as [x, y, width, height].

    {"image": "images/7.jpg", "width": 640, "height": 480, "captions": ["..."], "regions": [
        {"bbox": [10, 20, 30, 40], "category": "cup", "text": "TEA", "segmentation": [[x0, y0, ...]],
         "expressions": [{"kind": "color", "text": "the red cup"}], "iscrowd": 0}]}

`expressions` become `texts`, `text` becomes `ocr`, polygons or RLE in `segmentation` become `mask`, `iscrowd` becomes
`stuff`; `split`, `captions`, `tags`, `category`, and a region's `captions` and `tags` keep their names. Everything else
(ids, sources, licences) has no place in a region record and is left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..records import Mask, Record, Region
from .fields import distinct, json_lines, need, one_sentence, segmentation_to_mask, texts, want, xywh_to_xyxy


def import_xywh_jsonl(path: Path, image_root: Path) -> Iterator[tuple[str, Record | Exception]]:
    """Stream ("line N", record), with the error in place of a record that is not valid."""
    for label, item in json_lines(path):
        if isinstance(item, Exception):
            yield label, item
            continue
        try:
            record = _record(item)
        except ValueError as error:
            yield label, error
        else:
            yield label, record


def _record(item: Mapping[str, Any]) -> Record:
    width, height = need(item, "width", int), need(item, "height", int)
    return Record(
        image=need(item, "image", str),
        width=width,
        height=height,
        split=want(item, "split", str, None),
        captions=texts(item, "captions"),
        tags=texts(item, "tags"),
        regions=[
            _named_region(index, region, width, height) for index, region in enumerate(want(item, "regions", list, []))
        ],
    )


def _named_region(index: int, item: Any, width: int, height: int) -> Region:
    if not isinstance(item, dict):
        raise ValueError(f"regions[{index}] is not an object")
    try:
        return _region(item, width, height)
    except ValueError as error:
        raise ValueError(f"regions[{index}]: {one_sentence(error)}") from None


def _region(item: Mapping[str, Any], width: int, height: int) -> Region:
    expressions = want(item, "expressions", list, [])
    if not all(isinstance(expression, dict) for expression in expressions):
        raise ValueError("'expressions' must be objects with a 'text'")
    mask = segmentation_to_mask(item.get("segmentation"), width, height)
    return Region(
        box_xyxy=xywh_to_xyxy(need(item, "bbox", list)),
        category=want(item, "category", str, "").strip() or None,
        stuff=bool(want(item, "iscrowd", (int, bool), False)),
        texts=distinct([need(expression, "text", str) for expression in expressions]),
        captions=texts(item, "captions"),
        tags=texts(item, "tags"),
        ocr=want(item, "text", str, "").strip() or None,
        mask=None if mask is None else Mask(**mask),
    )
