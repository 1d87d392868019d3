"""What the text conventions have in common: found boxes, groups to write, numbers to read."""

import re
from collections.abc import Sequence
from typing import NamedTuple, Protocol

# Twelve digits are beyond any image; a longer run is noise and never reaches int() or float().
_INTEGER = re.compile(r"-?[0-9]{1,12}")
_DECIMAL = re.compile(r"-?(?:[0-9]{1,12}(?:\.[0-9]{0,12})?|\.[0-9]{1,12})")


class MalformedBoxError(ValueError):
    """The text tries to hold a box and fails. Never leaves `BoxFormat.parse`."""


class FoundBox(NamedTuple):
    """A box in a text: its characters `start:end` and its x1, y1, x2, y2 in quanta of the format."""

    start: int
    end: int
    quanta: tuple[float, float, float, float]


class BoxGroup(NamedTuple):
    """Boxes to write under one label (None = no label): `rows` are four whole quanta each."""

    label: str | None
    rows: list[tuple[int, int, int, int]]


class BoxSyntax(Protocol):
    """One way of writing boxes into text. Implementations read in time linear in the text."""

    @property
    def reserved(self) -> tuple[str, ...]:
        """Strings that mean "here is a box" and so may not stand in a label."""
        ...

    def render(self, groups: Sequence[BoxGroup]) -> str:
        """The text of one or more groups of boxes."""
        ...

    def scan(self, text: str) -> list[FoundBox]:
        """All boxes in the text, in order; MalformedBoxError when anything in it tries to be a box and is not."""
        ...


def read_box(items: Sequence[str], decimals: int) -> tuple[float, float, float, float]:
    """Four number texts -> quanta. Numbers are ASCII, at most twelve digits, and whole when `decimals` is 0.

    Raises:
        MalformedBoxError: not four, or not such numbers.
    """
    pattern = _DECIMAL if decimals else _INTEGER
    numbers = [item.strip() for item in items]
    if len(numbers) != 4 or not all(pattern.fullmatch(number) for number in numbers):
        raise MalformedBoxError(f"not a box: {', '.join(numbers)[:80]}")
    x1, y1, x2, y2 = (float(number) * 10**decimals for number in numbers)
    return (x1, y1, x2, y2)


def write_number(quanta: int, decimals: int) -> str:
    """Whole quanta -> text: 7 -> "7", or "0.07" with two decimals."""
    return f"{quanta / 10**decimals:.{decimals}f}"
