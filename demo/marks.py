"""What a user draws: numbered boxes and points with labels, as they come from a browser or a client."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..mllm.boxes import Boxes, Points
from ..vision_towers import UserError
from .limits import Limits

LABEL_CHARS = 40


@dataclass(frozen=True)
class Mark:
    """A box or a point on the picture.

    Attributes:
        number: what its chip says, `[3]`; never used again for another mark of this picture.
        box_xyxy: the region it stands for, in pixels of the picture; of a point the 5 px box around it.
        point_xy: where it is, when it is a point.
        label: the user's own word for it; a chip may use it in place of the number.
    """

    number: int
    box_xyxy: tuple[float, float, float, float]
    point_xy: tuple[float, float] | None = None
    label: str = ""


def read_marks(rows: Any, size: tuple[int, int], limits: Limits) -> list[Mark]:
    """Marks of a picture of `size = (width, height)` from JSON: `{"number", "box_xyxy" or "point_xy", "label"}` each.

    Numbers that are absent are given in order. Boxes are cut to the picture.

    Raises:
        UserError: another form, too many, two with one number, or one outside of the picture.
    """
    if rows is None:
        return []
    if not isinstance(rows, Sequence) or isinstance(rows, str) or not all(isinstance(row, Mapping) for row in rows):
        raise UserError('marks is a list of objects like {"number": 1, "box_xyxy": [x1, y1, x2, y2], "label": ""}.')
    if len(rows) > limits.marks:
        raise UserError(f"{len(rows)} marks are too many; a picture takes {limits.marks}. Delete some.")
    marks = [_read_mark(row, place, size) for place, row in enumerate(rows, 1)]
    numbers = [mark.number for mark in marks]
    if len(set(numbers)) != len(numbers):
        raise UserError(f"two marks have one number: {numbers}.")
    return marks


def _read_mark(row: Mapping[str, Any], place: int, size: tuple[int, int]) -> Mark:
    number = row.get("number", place)
    if type(number) is not int or not 1 <= number <= 9999:
        raise UserError(f"the number of mark {place} must be a whole number from 1 to 9999, got {number!r}.")
    label = row.get("label") or ""
    if not isinstance(label, str):
        raise UserError(f"the label of mark [{number}] must be text.")
    label = " ".join(label.replace("[", " ").replace("]", " ").split())[:LABEL_CHARS]
    box, point = row.get("box_xyxy"), row.get("point_xy")
    if (box is None) == (point is None):
        raise UserError(f"mark [{number}] needs either box_xyxy or point_xy.")
    width, height = size
    if point is not None:
        x, y = _numbers(point, 2, f"point_xy of mark [{number}]")
        if not (0 <= x <= width and 0 <= y <= height):
            raise UserError(f"point [{number}] at ({x:g}, {y:g}) lies outside the {width} x {height} picture.")
        region = Points([(x, y)]).to_boxes().clip(width, height)[0]
        return Mark(number, region, (x, y), label)
    corners = _numbers(box, 4, f"box_xyxy of mark [{number}]")
    cut = Boxes([corners]).clip(width, height)
    if not cut.area[0] > 0:
        raise UserError(f"box [{number}] {corners} covers nothing of the {width} x {height} picture.")
    return Mark(number, cut[0], None, label)


def _numbers(values: Any, count: int, what: str) -> list[float]:
    if not isinstance(values, Sequence) or isinstance(values, str) or len(values) != count:
        raise UserError(f"{what} must be {count} numbers in pixels of the picture.")
    # type() and not isinstance(): JSON's true is an int to Python.
    if any(type(value) not in (int, float) or not math.isfinite(value) for value in values):
        raise UserError(f"{what} must be {count} finite numbers in pixels of the picture.")
    return [float(value) for value in values]
