"""Boxes and points: numbers with a fixed meaning.

A box is xyxy floats with continuous edges (pixel column `i` covers `[i, i + 1]`), in pixels. Unless a docstring says
otherwise the pixels are those of the *original* image after EXIF transpose.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, overload

import numpy as np
from numpy.typing import ArrayLike

from ...vision_towers.errors import UserError

if TYPE_CHECKING:
    import torch


class Boxes:
    """An immutable list of boxes.

    Args:
        xyxy: `(N, 4)` numbers, left, top, right, bottom. A box without area is allowed (a thin object, a rounded
            answer); it overlaps nothing.

    Attributes:
        xyxy: `(N, 4)` float64, read-only.

    Raises:
        UserError: wrong shape, a NaN or infinite number, or right < left / bottom < top; the sentence names the row.
    """

    __slots__ = ("xyxy",)

    xyxy: np.ndarray

    def __init__(self, xyxy: ArrayLike) -> None:
        array = _rows(xyxy, 4, "box", "[x1, y1, x2, y2]")
        inverted = (array[:, 2:] < array[:, :2]).any(axis=1)
        if inverted.any():
            row = int(inverted.argmax())
            raise UserError(
                f"box {row} {array[row].tolist()} is inverted: give [left, top, right, bottom] with right >= left and "
                "bottom >= top (Boxes.from_xywh reads x, y, width, height)."
            )
        object.__setattr__(self, "xyxy", array)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError("Boxes are immutable; make new ones.")

    def __reduce__(self) -> tuple[type[Boxes], tuple[np.ndarray]]:
        return Boxes, (self.xyxy,)

    @classmethod
    def from_xywh(cls, xywh: ArrayLike) -> Boxes:
        """Boxes from `(N, 4)` left, top, width, height (COCO). A negative width or height is a UserError."""
        array = _rows(xywh, 4, "box", "[x, y, width, height]")
        negative = (array[:, 2:] < 0).any(axis=1)
        if negative.any():
            row = int(negative.argmax())
            raise UserError(f"box {row} {array[row].tolist()} (x, y, width, height) has a negative size; mend the row.")
        return cls(np.concatenate([array[:, :2], array[:, :2] + array[:, 2:]], axis=1))

    @classmethod
    def empty(cls) -> Boxes:
        """No boxes."""
        return cls(np.zeros((0, 4)))

    def __len__(self) -> int:
        return len(self.xyxy)

    @overload
    def __getitem__(self, index: int | np.integer) -> tuple[float, float, float, float]: ...
    @overload
    def __getitem__(self, index: slice | Sequence[int] | np.ndarray) -> Boxes: ...
    def __getitem__(self, index):
        """One box as a tuple for an integer; Boxes for a slice, a list of indices or a boolean mask."""
        if isinstance(index, int | np.integer):
            x1, y1, x2, y2 = self.xyxy[index].tolist()
            return (x1, y1, x2, y2)
        if not isinstance(index, slice) and len(index) == 0:
            return Boxes.empty()  # numpy reads an empty list as floats, and those are no indices
        return Boxes(self.xyxy[index])

    def __iter__(self) -> Iterator[tuple[float, float, float, float]]:
        return (self[row] for row in range(len(self)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Boxes) and np.array_equal(self.xyxy, other.xyxy)

    __hash__ = None  # type: ignore[assignment]  # equality compares floats; a hash would invite using them as keys

    def __repr__(self) -> str:
        return f"Boxes({self.xyxy.tolist()})"

    @property
    def area(self) -> np.ndarray:
        """`(N,)` areas in square pixels."""
        return (self.xyxy[:, 2] - self.xyxy[:, 0]) * (self.xyxy[:, 3] - self.xyxy[:, 1])

    def clip(self, width: float, height: float) -> Boxes:
        """Every box cut to `[0, width] x [0, height]`; the rows stay, one wholly outside becomes a box without area."""
        return Boxes(np.clip(self.xyxy, 0.0, np.array([width, height, width, height], dtype=np.float64)))

    def iou(self, other: Boxes) -> np.ndarray:
        """`(N, M)` intersection over union; 0 wherever the union has no area."""
        a, b = self.xyxy[:, None], other.xyxy[None]
        sides = np.clip(np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2]), 0.0, None)
        intersection = sides[..., 0] * sides[..., 1]
        union = self.area[:, None] + other.area[None] - intersection
        return np.divide(intersection, union, out=np.zeros_like(intersection), where=union > 0)

    def tensor(self) -> torch.Tensor:
        """`(N, 4)` float32 torch tensor (a copy), as towers take boxes."""
        import torch

        return torch.tensor(self.xyxy, dtype=torch.float32).reshape(-1, 4)


class Points:
    """An immutable list of points; a separate type, so that a point is never mistaken for half a box.

    Args:
        xy: `(N, 2)` numbers in pixels.

    Raises:
        UserError: wrong shape, a NaN or infinite number; the sentence names the row.
    """

    __slots__ = ("xy",)

    xy: np.ndarray

    def __init__(self, xy: ArrayLike) -> None:
        object.__setattr__(self, "xy", _rows(xy, 2, "point", "[x, y]"))

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError("Points are immutable; make new ones.")

    def __reduce__(self) -> tuple[type[Points], tuple[np.ndarray]]:
        return Points, (self.xy,)

    def __len__(self) -> int:
        return len(self.xy)

    def __iter__(self) -> Iterator[tuple[float, float]]:
        return ((x, y) for x, y in self.xy.tolist())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Points) and np.array_equal(self.xy, other.xy)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Points({self.xy.tolist()})"

    def to_boxes(self, side: float = 5.0) -> Boxes:
        """The `side` x `side` pixel boxes around the points (CLOC turns a point prompt into such a box).

        A box at the border sticks out of the image; `Boxes.clip` or `ImageFrame.to_input` cuts it.
        """
        if not side > 0:
            raise UserError(f"the side of the box around a point must be positive, got {side}.")
        return Boxes(np.concatenate([self.xy - side / 2, self.xy + side / 2], axis=1))


def _rows(values: ArrayLike, columns: int, what: str, form: str) -> np.ndarray:
    """A read-only `(N, columns)` float64 copy of finite numbers, or a UserError that names what is wrong."""
    try:
        array = np.array(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise UserError(f"every {what} must be {columns} numbers {form}: {error}.") from error
    if array.size == 0:
        array = array.reshape(0, columns)
    if array.ndim != 2 or array.shape[1] != columns:
        raise UserError(f"give a list of {what} rows of {columns} numbers {form}, not an array of shape {array.shape}.")
    bad = ~np.isfinite(array).all(axis=1)
    if bad.any():
        row = int(bad.argmax())
        raise UserError(f"{what} {row} {array[row].tolist()} holds a number that is not finite; mend or drop it.")
    array.flags.writeable = False
    return array
