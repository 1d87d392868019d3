"""Kosmos-2's location tokens: two cells of a 32 x 32 grid stand for a box."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .syntax import BoxGroup, FoundBox, MalformedBoxError

PATCHES_PER_SIDE = 32

_START = "<patch_index_"
_CELL = re.compile(r"<patch_index_([0-9]{4})>")
_BETWEEN = "</delimiter_of_multi_objects/>"


@dataclass(frozen=True)
class PatchSyntax:
    """`<patch_index_0044><patch_index_0863>`: the cells of the top left and the bottom right corner, row by row.

    Location tokens are reserved: they must stand in adjacent pairs. Boxes under a label are written as
    `<phrase>label</phrase><object>box</object>`.
    """

    @property
    def reserved(self) -> tuple[str, ...]:
        return ("<", ">")

    def render(self, groups: Sequence[BoxGroup]) -> str:
        texts = []
        for label, rows in groups:
            boxes = _BETWEEN.join(
                f"<patch_index_{y1 * PATCHES_PER_SIDE + x1:04d}><patch_index_{y2 * PATCHES_PER_SIDE + x2:04d}>"
                for x1, y1, x2, y2 in rows
            )
            texts.append(f"<phrase>{label}</phrase><object>{boxes}</object>" if label else boxes)
        return " ".join(texts)

    def scan(self, text: str) -> list[FoundBox]:
        cells = list(_CELL.finditer(text))
        if len(cells) != text.count(_START) or len(cells) % 2:
            raise MalformedBoxError("a location token is broken or has no partner")
        found = []
        for first, second in zip(cells[::2], cells[1::2], strict=True):
            if first.end() != second.start() or (found and found[-1].end == first.start()):
                raise MalformedBoxError("location tokens do not stand in pairs")
            found.append(FoundBox(first.start(), second.end(), cell_edges(int(first[1]), int(second[1]))))
        return found


def cell_edges(first: int, last: int) -> tuple[float, float, float, float]:
    """Two cell numbers -> xyxy in cells, the way Kosmos-2 reads them.

    A box reaches from the middle of its first cell to the middle of its last; one that spans a single row or a single
    column of cells covers those cells whole, or it would have no area.

    Raises:
        MalformedBoxError: a number beyond the grid, or the second cell left of or above the first.
    """
    if max(first, last) >= PATCHES_PER_SIDE**2:
        raise MalformedBoxError("a location token beyond the grid")
    (y1, x1), (y2, x2) = divmod(first, PATCHES_PER_SIDE), divmod(last, PATCHES_PER_SIDE)
    if x2 < x1 or y2 < y1:
        raise MalformedBoxError("inverted box")
    if x1 == x2 or y1 == y2:
        return (float(x1), float(y1), float(x2 + 1), float(y2 + 1))
    return (x1 + 0.5, y1 + 0.5, x2 + 0.5, y2 + 0.5)


def corner_cells(quanta: np.ndarray, top: np.ndarray) -> np.ndarray:
    """`(N, 4)` edges in cells -> `(N, 4)` int64 cells of the corners: first column and row, last column and row.

    An edge on the line between two cells belongs to the cell inside the box.
    """
    first = np.minimum(np.floor(quanta[:, :2]), top - 1)
    last = np.maximum(np.ceil(quanta[:, 2:]) - 1, first)
    return np.concatenate([first, last], axis=1).astype(np.int64)
