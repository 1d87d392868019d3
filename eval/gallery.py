"""Pictures of a report: the best, the worst and random answers, with true and predicted boxes drawn."""

from __future__ import annotations

import base64
import io
import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from ..mllm.boxes import Boxes
from ..mllm.draw import draw_boxes
from ..train_stages.images import open_image
from ..train_stages.masks import decode_mask
from .marks import Mark, draw_marks
from .task_kinds import ALL_TASKS, BOX_KINDS

PICTURE_SIDE = 480  # pixels of the longer side in the gallery
TRUE_COLOR, MODEL_COLOR = "lime", "magenta"  # of very different lightness, for the colour-blind
_ANSWER_LENGTH = 160
_LEGENDS = {  # of the kinds whose answer is boxes
    "grounding": "green: the true box, pink: the model's",
    "absent": "nothing in the picture fits; pink: a box that the model gave all the same",
    "several": "green: the true boxes, pink: the model's",
    "counting": "green: the true boxes, pink: the model's; as many as there are things",
}
_ASKED = "green: the box that is asked about (red: a point or shape)"

Row = Mapping[str, Any]


def gallery(task: str, rows: Sequence[Row], count: int) -> dict[str, Any]:
    """What the page shows of one task: at most `count` pictures in groups. All rows where there are so few, else a
    third with the best answers, a third with the worst, and random ones."""
    kind = ALL_TASKS[task]
    return {
        "task": task_title(task),
        "n": len(rows),
        "legend": _LEGENDS.get(kind, _ASKED),
        "groups": [
            {"name": name, "pictures": [_picture(row, kind) for row in chosen]}
            for name, chosen in chosen_rows(rows, count).items()
            if chosen
        ],
    }


def task_title(task: str) -> str:
    """A task's name as people read it."""
    return task.removeprefix("regiontower_").replace("_", " ")


def chosen_rows(rows: Sequence[Row], count: int) -> dict[str, list[Row]]:
    """Group name -> rows, none of them twice; the same ones every time."""
    if len(rows) <= count:
        return {"all": list(rows)}
    third = count // 3
    order = sorted(random.Random(0).sample(range(len(rows)), len(rows)), key=lambda index: _quality(rows[index]))
    worst, best = order[:third], order[len(order) - third :][::-1]
    taken = {*worst, *best}
    left = [index for index in range(len(rows)) if index not in taken]
    others = sorted(random.Random(1).sample(left, count - 2 * third))
    groups = {"best": best, "worst": worst, "random": others}
    return {name: [rows[index] for index in indices] for name, indices in groups.items()}


def _quality(row: Row) -> float:
    for name in ("iou", "f1", "rouge_l", "score"):
        if row.get(name) is not None:
            return float(row[name])
    return float(row["correct"])


def _picture(row: Row, kind: str) -> dict[str, Any]:
    answer = row["answer"]
    return {
        "source": data_url(_drawn(row, kind), "JPEG"),
        "question": row["question"],
        "answer": (answer[:_ANSWER_LENGTH] + " ...") if len(answer) > _ANSWER_LENGTH else answer or "(no answer)",
        "target": None if kind in BOX_KINDS else " / ".join(row["target"][:3]),
        "note": _note(row, kind),
        "correct": row.get("correct"),
    }


def _note(row: Row, kind: str) -> str | None:
    if kind in ("several", "counting"):
        return f"{row['found']} of {row['true']} found, {row['predicted']} given"
    if kind == "captioning":
        return f"CIDEr {row['cider']:.2f}, ROUGE-L {row['rouge_l']:.2f}"
    if kind == "judged":
        return f"marks {row['score']:g} against {row['reference_score']:g}" if row["judged"] else "not judged"
    return None if row.get("iou") is None else f"IoU {row['iou']:.2f}"


def _drawn(row: Row, kind: str) -> Image.Image:
    image = open_image(row["image"])
    if kind not in BOX_KINDS and (row.get("point_xy") or row.get("shape")):
        mask = decode_mask((image.height, image.width), row["shape"]) if row.get("shape") else None
        marks = [Mark("shape" if mask is not None else "point", tuple(box)) for box in row["prompt_boxes"]]
        return _small(draw_marks(image, marks, mask))
    if kind in ("several", "counting"):
        boxes = [(TRUE_COLOR, box) for box in row["target"]] + [(MODEL_COLOR, box) for box in row["predicted_boxes"]]
    elif kind in BOX_KINDS:
        boxes = [(TRUE_COLOR, row["target"]), (MODEL_COLOR, row["predicted_xyxy"])]
    else:
        boxes = [(TRUE_COLOR, box) for box in row["prompt_boxes"]]
    return _with_boxes(image, [(color, box) for color, box in boxes if box])


def _with_boxes(image: Image.Image, boxes: Sequence[tuple[str, Sequence[float]]]) -> Image.Image:
    """A copy of the gallery's size with the boxes (colour, xyxy in pixels of `image`) drawn on it.

    Without labels: on a small box a label would hide what is in it.
    """
    picture = _small(image)
    scale = np.array([picture.width / image.width, picture.height / image.height] * 2)
    return draw_boxes(picture, Boxes([box * scale for _, box in boxes]), [color for color, _ in boxes])


def _small(image: Image.Image) -> Image.Image:
    picture = image.copy()
    picture.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
    return picture


def data_url(image: Image.Image, kind: str) -> str:
    """The picture as text that an HTML page can hold. kind: "JPEG" or "PNG"."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **({"quality": 85} if kind == "JPEG" else {}))
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
