"""`[x1, y1, x2, y2]` in a sentence: norm01, shikra, int1000, pixel."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from .syntax import BoxGroup, FoundBox, MalformedBoxError, read_box, write_number

_BRACKETS = re.compile(r"\[([^\[\]]*)\]")


@dataclass(frozen=True)
class BracketSyntax:
    """Square brackets are reserved for boxes: whatever stands in them must be boxes, and they may not nest.

    Attributes:
        decimals: digits after the point; 0 = whole numbers only.
        comma: what is written between two numbers; any spaces are read.
        several_in_one: Shikra's `[box;box]`; otherwise every box has its own brackets, `[box] [box]`.
    """

    decimals: int
    comma: str = ", "
    several_in_one: bool = False

    @property
    def reserved(self) -> tuple[str, ...]:
        return ("[", "]")

    def render(self, groups: Sequence[BoxGroup]) -> str:
        join = ";" if self.several_in_one else "] ["
        texts = []
        for label, rows in groups:
            boxes = join.join(self.comma.join(write_number(value, self.decimals) for value in row) for row in rows)
            texts.append(f"{label} [{boxes}]" if label else f"[{boxes}]")
        return " ".join(texts)

    def scan(self, text: str) -> list[FoundBox]:
        brackets = list(_BRACKETS.finditer(text))
        if not len(brackets) == text.count("[") == text.count("]"):
            raise MalformedBoxError("a square bracket has no partner, or brackets nest")
        return [found for match in brackets for found in self._read(match)]

    def _read(self, match: re.Match[str]) -> list[FoundBox]:
        if not self.several_in_one:
            return [FoundBox(match.start(), match.end(), read_box(match[1].split(","), self.decimals))]
        found, start = [], match.start(1)
        for piece in match[1].split(";"):
            found.append(FoundBox(start, start + len(piece), read_box(piece.split(","), self.decimals)))
            start += len(piece) + 1
        return found
