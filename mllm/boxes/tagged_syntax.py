"""Boxes between special tokens: qwen2, deepseek_det, internvl_box.

Decode such answers with `skip_special_tokens=False`: without its tokens the text holds no box.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from .syntax import BoxGroup, FoundBox, MalformedBoxError, read_box

Rows = Sequence[tuple[int, int, int, int]]

_BRACKETS = re.compile(r"\[([^\[\]]*)\]")
_NESTED = re.compile(r"\[#(?:,#)*\]")
_PAIRS = re.compile(r"\s*\(([^()]*)\)\s*,\s*\(([^()]*)\)\s*")


@dataclass(frozen=True)
class TaggedSyntax:
    """The opening and closing tags are reserved for boxes; all other text, brackets too, is just text.

    Attributes:
        tags: opening and closing tag around the coordinates.
        label_tags: opening and closing tag around a label before them.
        write_inside: the boxes of one label -> text with the tags.
        read_inside: the text between the tags and its position -> its boxes.
    """

    tags: tuple[str, str]
    label_tags: tuple[str, str]
    write_inside: Callable[[Rows, tuple[str, str]], str]
    read_inside: Callable[[str, int], list[FoundBox]]

    @property
    def reserved(self) -> tuple[str, ...]:
        return (*self.tags, *self.label_tags)

    @cached_property
    def _tag(self) -> re.Pattern[str]:
        return re.compile("|".join(re.escape(tag) for tag in self.tags))

    def render(self, groups: Sequence[BoxGroup]) -> str:
        before, after = self.label_tags
        return "".join(
            (f"{before}{label}{after}" if label else "") + self.write_inside(rows, self.tags) for label, rows in groups
        )

    def scan(self, text: str) -> list[FoundBox]:
        return [found for start, end in self._between_tags(text) for found in self.read_inside(text[start:end], start)]

    def _between_tags(self, text: str) -> Iterator[tuple[int, int]]:
        opened: re.Match[str] | None = None
        for tag in self._tag.finditer(text):
            if (tag[0] == self.tags[0]) != (opened is None):
                raise MalformedBoxError("a box tag has no partner")
            if opened is None:
                opened = tag
            else:
                yield opened.end(), tag.start()
                opened = None
        if opened is not None:
            raise MalformedBoxError("the last box is not closed")


def write_nested(rows: Rows, tags: tuple[str, str]) -> str:
    """`<tag>[[x1, y1, x2, y2], [x1, y1, x2, y2]]</tag>`"""
    boxes = ", ".join(f"[{x1}, {y1}, {x2}, {y2}]" for x1, y1, x2, y2 in rows)
    return f"{tags[0]}[{boxes}]{tags[1]}"


def read_nested(inside: str, position: int) -> list[FoundBox]:
    """The boxes of `[[x1, y1, x2, y2], ...]`; one or more."""
    boxes = list(_BRACKETS.finditer(inside))
    skeleton = "".join(_BRACKETS.sub("#", inside).split())
    if not _NESTED.fullmatch(skeleton) or skeleton.count("#") != len(boxes):
        raise MalformedBoxError("not a list of boxes [[x1, y1, x2, y2], ...]")
    return [FoundBox(position + box.start(), position + box.end(), read_box(box[1].split(","), 0)) for box in boxes]


def write_pairs(rows: Rows, tags: tuple[str, str]) -> str:
    """`<tag>(x1,y1),(x2,y2)</tag>`, once for every box."""
    return "".join(f"{tags[0]}({x1},{y1}),({x2},{y2}){tags[1]}" for x1, y1, x2, y2 in rows)


def read_pairs(inside: str, position: int) -> list[FoundBox]:
    """The one box of `(x1,y1),(x2,y2)`."""
    pairs = _PAIRS.fullmatch(inside)
    if pairs is None:
        raise MalformedBoxError("not a box (x1,y1),(x2,y2)")
    first, second = pairs[1].split(","), pairs[2].split(",")
    if len(first) != 2:
        raise MalformedBoxError("a corner is not two numbers")
    return [FoundBox(position, position + len(inside), read_box([*first, *second], 0))]
