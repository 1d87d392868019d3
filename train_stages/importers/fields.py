"""Take typed fields out of other people's JSON, with one sentence when they are not there."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ...vision_towers.errors import UserError
from ..masks import check_counts, compress_counts, polygons_to_mask
from ..records import explain


class NothingToImport(Exception):
    """A sound item that no region record can hold; it is counted apart from the bad ones."""


def json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any] | ValueError]]:
    """Stream a JSONL file as ("line N", object), with a ValueError in place of a line that is not a JSON object.

    Blank lines are passed over. Raises UserError when the file cannot be read.
    """
    for label, line in raw_lines(path):
        try:
            value = json.loads(line.decode("utf-8"))
            if not isinstance(value, dict):
                raise ValueError(f"is a JSON {type(value).__name__}, not an object")
        except (ValueError, RecursionError) as error:
            yield label, ValueError(f"is not valid JSON: {error}")
        else:
            yield label, value


def json_list_or_lines(path: Path) -> Iterator[tuple[str, dict[str, Any] | ValueError]]:
    """The objects of a JSON list ("item N", read whole) or of a JSONL ("line N", streamed); the first character of the
    file tells which. Raises UserError when the file cannot be read, or is a list that is not JSON."""
    first = next((line.lstrip()[:1] for _, line in raw_lines(path)), b"")
    if first != b"[":
        yield from json_lines(path)
        return
    for number, value in enumerate(json_document(path)):
        is_object = isinstance(value, dict)
        yield f"item {number}", value if is_object else ValueError(f"is a JSON {type(value).__name__}, not an object")


def raw_lines(path: Path) -> Iterator[tuple[str, bytes]]:
    """Stream the lines of a file that are not blank as ("line N", bytes). Raises UserError when it cannot be read."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line  # a byte order mark
                if line.strip():
                    yield f"line {number}", line
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path.") from None


def json_document(path: Path) -> Any:
    """Read one whole JSON file. Raises UserError when it cannot be read or is not JSON."""
    try:
        return json.loads(path.read_bytes().decode("utf-8-sig"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path.") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is not valid JSON ({error}).") from None


def need(item: Mapping[str, Any], key: str, kind: type | tuple[type, ...]) -> Any:
    """`item[key]`, which must be there and of `kind` (never a bool unless asked). Raises ValueError."""
    if key not in item:
        raise ValueError(f"{key!r} is missing")
    value = item[key]
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{key!r} is {value!r:.60}, of the wrong type")
    return value


def want(item: Mapping[str, Any], key: str, kind: type | tuple[type, ...], default: Any) -> Any:
    """`item[key]` of `kind`, or `default` when it is absent or null. Raises ValueError for another type."""
    return default if item.get(key) is None else need(item, key, kind)


def texts(item: Mapping[str, Any], key: str) -> list[str]:
    """A list of strings, without blank ones and repetitions; [] when absent. Raises ValueError."""
    values = want(item, key, list, [])
    if not all(isinstance(value, str) for value in values):
        raise ValueError(f"{key!r} holds something that is not a string")
    return distinct(values)


def distinct(values: list[str]) -> list[str]:
    """Strip each string; leave out blank ones and repetitions, keep the order."""
    return list(dict.fromkeys(stripped for value in values if (stripped := value.strip())))


def segmentation_to_mask(segmentation: Any, width: int, height: int) -> dict[str, Any] | None:
    """COCO's `segmentation` (polygons, RLE with text or list counts, or nothing) -> a mask in RLE, or None when it
    covers no pixel. Raises ValueError."""
    if not segmentation:
        return None
    if isinstance(segmentation, dict):
        size, counts = need(segmentation, "size", list), need(segmentation, "counts", (str, list))
        if len(size) != 2 or not all(type(side) is int for side in size):
            raise ValueError("'segmentation' has a 'size' that is not [height, width]")
        text = counts if isinstance(counts, str) else compress_counts(size, counts)
        return {"size": size, "counts": text} if any(check_counts(size, text)[1::2]) else None
    if not isinstance(segmentation, list) or not all(isinstance(polygon, list) for polygon in segmentation):
        raise ValueError("'segmentation' is neither a list of polygons nor an RLE object")
    return polygons_to_mask(segmentation, width, height)


def one_sentence(error: Exception) -> str:
    """What an exception says, on one line: pydantic's many lines are reduced to the first fault."""
    if isinstance(error, ValidationError):
        return explain(error)
    return " ".join(str(error).split()) or type(error).__name__


def xywh_to_xyxy(bbox: Any) -> tuple[float, float, float, float]:
    """[x, y, width, height] -> x0, y0, x1, y1. Raises ValueError unless they are four finite numbers."""
    numbers = bbox if isinstance(bbox, list) else []
    if len(numbers) != 4 or any(isinstance(n, bool) or not isinstance(n, int | float) for n in numbers):
        raise ValueError(f"'bbox' is {bbox!r:.60}, not [x, y, width, height]")
    try:
        x, y, width, height = (float(number) for number in numbers)
    except OverflowError:
        raise ValueError("'bbox' holds a number that is too large") from None
    if not all(math.isfinite(number) for number in (x, y, width, height)):
        raise ValueError("'bbox' holds a number that is not finite")
    return x, y, x + width, y + height
