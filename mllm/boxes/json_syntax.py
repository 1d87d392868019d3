"""`[{"bbox_2d": [x1, y1, x2, y2], "label": "..."}]`: qwen2_5_json, qwen3_json."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

from .syntax import BoxGroup, FoundBox, MalformedBoxError

_KEY = "bbox_2d"
_COORDINATES = re.compile(r'"bbox_2d"\s*:\s*(\[[^\[\]]*\])')
_LARGEST = 10**12


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is no coordinate")


# Python reads NaN and Infinity, which are not JSON.
_DECODER = json.JSONDecoder(parse_constant=_refuse)


@dataclass(frozen=True)
class JsonSyntax:
    """One JSON list of objects, bare or in a code fence; square brackets outside of it are malformed.

    The coordinates are whole numbers. An empty list is "none".
    """

    @property
    def reserved(self) -> tuple[str, ...]:
        return ()  # JSON escapes whatever a label holds

    def render(self, groups: Sequence[BoxGroup]) -> str:
        objects = [
            {_KEY: list(row), "label": label} if label else {_KEY: list(row)} for label, rows in groups for row in rows
        ]
        return json.dumps(objects, ensure_ascii=False)

    def scan(self, text: str) -> list[FoundBox]:
        start = text.find("[")
        if start < 0:
            if "]" in text or f'"{_KEY}"' in text:
                raise MalformedBoxError("a box outside of a JSON list")
            return []
        try:
            objects, end = _DECODER.raw_decode(text, start)
        except (ValueError, RecursionError) as error:
            raise MalformedBoxError("not JSON") from error
        outside = text[:start] + text[end:]
        if "[" in outside or "]" in outside or f'"{_KEY}"' in outside:
            raise MalformedBoxError("more than one JSON list")
        spans = [match.span(1) for match in _COORDINATES.finditer(text, start, end)]
        # A key in a nested or repeated place would shift the spans: one for every object, or nothing is believed.
        if len(spans) != len(objects):
            raise MalformedBoxError("not one bbox_2d for every object")
        return [FoundBox(*span, _read(entry)) for entry, span in zip(objects, spans, strict=True)]


def _read(entry: object) -> tuple[float, float, float, float]:
    numbers = entry.get(_KEY) if isinstance(entry, dict) else None
    if not isinstance(numbers, list) or len(numbers) != 4:
        raise MalformedBoxError("not an object with four coordinates")
    # type() and not isinstance(): JSON's true is an int to Python.
    if any(type(number) is not int or abs(number) > _LARGEST for number in numbers):
        raise MalformedBoxError("coordinates are whole numbers")
    x1, y1, x2, y2 = map(float, numbers)
    return (x1, y1, x2, y2)
