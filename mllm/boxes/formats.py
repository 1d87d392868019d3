"""The text conventions for boxes, each with exactly one declared meaning."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import groupby

import numpy as np

from ...vision_towers.errors import UserError
from ..prompts import NO_BOX
from .boxes import Boxes
from .bracket_syntax import BracketSyntax
from .frame import ImageFrame
from .grid import CoordinateGrid, nearest_quanta
from .json_syntax import JsonSyntax
from .parsed import ParsedBoxes
from .patch_syntax import PATCHES_PER_SIDE, PatchSyntax, corner_cells
from .syntax import BoxGroup, BoxSyntax, MalformedBoxError
from .tagged_syntax import TaggedSyntax, read_nested, read_pairs, write_nested, write_pairs

# Text such as 1.001 is not exactly 1001 quanta in floating point.
_ROUNDING = 1e-6


@dataclass(frozen=True)
class BoxFormat:
    """One way to say boxes in text. Get one with `box_format(name)`.

    Attributes:
        name: the key in `BOX_FORMATS`.
        grid: the declared frame and its quanta.
        syntax: how the numbers stand in the text.
        snap: `(N, 4)` quanta and `(2,)` top -> `(N, 4)` whole quanta to write.
    """

    name: str
    grid: CoordinateGrid
    syntax: BoxSyntax
    snap: Callable[[np.ndarray, np.ndarray], np.ndarray] = nearest_quanta

    def quantum(self, frame: ImageFrame) -> tuple[float, float]:
        """One quantum in original pixels, for x and y: how far an edge may move when written and read back."""
        return self.grid.quantum(frame)

    def write(self, boxes: Boxes, frame: ImageFrame, labels: Sequence[str | None] | None = None) -> str:
        """Boxes -> answer text.

        Args:
            boxes: `(N, 4)` original pixels. What the model input does not show is not said: a box that the frame cuts
                is written as its visible part, one outside is left out.
            frame: the map from the original to the model input.
            labels: one for every box, in the format's own way; neighbours with the same label are written together.
                None or "" = no label.

        Returns:
            The text; "none" when there is no box to write. A box thinner than one quantum is widened to one.

        Raises:
            UserError: a wrong number of labels, or a label that holds what this format reserves for boxes.
        """
        parts, kept = frame.visible_part(boxes)
        names = self._check_labels(labels, len(boxes))
        if not len(parts):
            return NO_BOX
        whole = self.snap(self.grid.to_quanta(parts, frame), self.grid.top(frame)).tolist()
        rows = [(names[index], tuple(row)) for index, row in zip(kept.tolist(), whole, strict=True)]
        return self.syntax.render(
            [BoxGroup(label, [row for _, row in group]) for label, group in groupby(rows, key=lambda row: row[0])]
        )

    def parse(self, text: str, frame: ImageFrame) -> ParsedBoxes:
        """Answer text -> boxes, by this format's convention alone. Never raises on any text; linear in its length.

        Text around the boxes is allowed. A coordinate out of range by at most one quantum is clipped. Further out, a
        list of another length, right < left, numbers of the wrong kind, an unclosed bracket or tag: "malformed".

        One malformed box makes the whole answer malformed and no box is returned, not even the good ones: the usual
        causes are an answer that was cut off and one in another convention, and a score for half of either would be a
        score for what the model did not say.

        Args:
            text: what the model wrote, special tokens included.
            frame: the map from the original to the model input.

        Returns:
            Status, and boxes in original pixels, cut to the image (a box that lies in the padding comes back without
            area at the image's edge).
        """
        try:
            found = self.syntax.scan(text)
            quanta = self._check_range(np.array([box.quanta for box in found]).reshape(-1, 4), self.grid.top(frame))
        except MalformedBoxError:
            return ParsedBoxes("malformed")
        if not found:
            return ParsedBoxes("none")
        return ParsedBoxes("boxes", self.grid.to_original(quanta, frame), [(box.start, box.end) for box in found])

    def _check_range(self, quanta: np.ndarray, top: np.ndarray) -> np.ndarray:
        """The quanta clipped to `[0, top]`, or MalformedBoxError."""
        corners = quanta.reshape(-1, 2, 2)
        if (corners < -1 - _ROUNDING).any() or (corners > top + 1 + _ROUNDING).any():
            raise MalformedBoxError("out of range by more than one quantum")
        if (corners[:, 1] < corners[:, 0]).any():
            raise MalformedBoxError("inverted box")
        return np.clip(corners, 0.0, top).reshape(-1, 4)

    def _check_labels(self, labels: Sequence[str | None] | None, count: int) -> list[str | None]:
        if labels is None:
            return [None] * count
        if len(labels) != count:
            raise UserError(f"{count} boxes came with {len(labels)} labels; give one label for every box.")
        for row, label in enumerate(labels):
            taken = next((mark for mark in self.syntax.reserved if label and mark in label), None)
            if taken:
                raise UserError(
                    f"label {row} {label!r} holds {taken!r}, which {self.name} reserves for boxes; remove it."
                )
        return [label or None for label in labels]


_FORMATS = {
    each.name: each
    for each in (
        BoxFormat("norm01", CoordinateGrid("padded_square", 100), BracketSyntax(decimals=2)),
        BoxFormat(
            "shikra",
            CoordinateGrid("padded_square", 1000),
            BracketSyntax(decimals=3, comma=",", several_in_one=True),
        ),
        # Ours, for small models: the fewest tokens, in the frame in which the image tokens lie.
        BoxFormat("square100", CoordinateGrid("padded_square", 100), BracketSyntax(decimals=0, comma=",")),
        BoxFormat("int1000", CoordinateGrid("original", 1000), BracketSyntax(decimals=0)),
        BoxFormat(
            "qwen2",
            CoordinateGrid("original", 1000),
            TaggedSyntax(
                ("<|box_start|>", "<|box_end|>"),
                ("<|object_ref_start|>", "<|object_ref_end|>"),
                write_pairs,
                read_pairs,
            ),
        ),
        BoxFormat("qwen2_5_json", CoordinateGrid("input", None), JsonSyntax()),
        BoxFormat("qwen3_json", CoordinateGrid("original", 1000), JsonSyntax()),
        BoxFormat(
            "deepseek_det",
            CoordinateGrid("original", 999),
            TaggedSyntax(("<|det|>", "<|/det|>"), ("<|ref|>", "<|/ref|>"), write_nested, read_nested),
        ),
        BoxFormat(
            "internvl_box",
            CoordinateGrid("original", 1000),
            TaggedSyntax(("<box>", "</box>"), ("<ref>", "</ref>"), write_nested, read_nested),
        ),
        BoxFormat("kosmos_patch", CoordinateGrid("input", PATCHES_PER_SIDE), PatchSyntax(), corner_cells),
        BoxFormat("pixel", CoordinateGrid("original", None), BracketSyntax(decimals=0)),
    )
}

BOX_FORMATS: tuple[str, ...] = tuple(_FORMATS)


def box_format(name: str) -> BoxFormat:
    """The format called `name`, one of `BOX_FORMATS`. An unknown name is a UserError that lists them."""
    if name not in _FORMATS:
        near = get_close_matches(name, BOX_FORMATS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UserError(f"there is no box format {name!r}; {hint}choose one of {', '.join(BOX_FORMATS)}.")
    return _FORMATS[name]
