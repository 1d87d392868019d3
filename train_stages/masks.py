"""COCO run-length masks: encode, decode, draw from polygons, and check before C code touches them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

_FIRST_CHARACTER = 48  # ord("0"), where COCO's alphabet starts
_LONGEST_GROUP = 7  # characters of a run: 32 bits and a sign


def encode_mask(mask: np.ndarray) -> dict[str, Any]:
    """Encode a (H, W) bool or 0/1 array as `{"size": [H, W], "counts": str}`. Raises ValueError for another shape."""
    from pycocotools import mask as coco

    if mask.ndim != 2:
        raise ValueError(f"a mask has the shape (height, width), not {mask.shape}")
    return _with_text_counts(coco.encode(np.asfortranarray(mask.astype(np.uint8))))


def decode_mask(size: Sequence[int], counts: str) -> np.ndarray:
    """Decode compressed counts to a (H, W) bool array. Raises ValueError when they do not fill `size` exactly."""
    from pycocotools import mask as coco

    check_counts(size, counts)
    return coco.decode({"size": list(size), "counts": counts.encode("ascii")}).astype(bool)


def polygons_to_mask(polygons: Iterable[Sequence[float]], width: int, height: int) -> dict[str, Any] | None:
    """Fill polygons (each x0, y0, x1, y1, ... in image pixels, cut at the image's edges) into one mask; None when
    nothing is left of it.

    A polygon of fewer than three points encloses nothing and is left out: pycocotools would read four numbers as an
    xywh box. Raises ValueError for an odd number of coordinates, or one that is not finite.
    """
    from pycocotools import mask as coco

    height, width = _check_size((height, width))
    drawable: list[list[Any]] = []
    for polygon in polygons:
        if any(isinstance(value, bool) or not isinstance(value, int | float) for value in polygon):
            raise ValueError("a polygon holds something that is not a number")
        if len(polygon) % 2:
            raise ValueError(f"a polygon has an odd number of coordinates ({len(polygon)})")
        if not all(abs(value) < math.inf for value in polygon):  # also false for NaN
            raise ValueError("a polygon has a coordinate that is not finite")
        if len(polygon) >= 6:
            # Far outside coordinates make pycocotools allocate for the whole outline; what is outside shows nothing.
            drawable.append([float(min(max(value, -1e5), 1e5)) for value in polygon])
    if not drawable:
        return None
    encoded = coco.merge(coco.frPyObjects(drawable, height, width))
    return _with_text_counts(encoded) if int(coco.area(encoded)) else None


def compress_counts(size: Sequence[int], counts: Sequence[int]) -> str:
    """Uncompressed counts (run lengths, background first) -> COCO's compressed text. Raises ValueError when the runs
    are not whole numbers >= 0 that fill `size` exactly."""
    from pycocotools import mask as coco

    if any(isinstance(run, bool) or not isinstance(run, int) or run < 0 for run in counts):
        raise ValueError("mask counts must be whole numbers >= 0")
    _check_fill(size, list(counts))
    height, width = size
    uncompressed: Any = {"size": [height, width], "counts": list(counts)}
    return _with_text_counts(coco.frPyObjects(uncompressed, height, width))["counts"]


def check_counts(size: Sequence[int], counts: str) -> list[int]:
    """Read compressed counts as run lengths (background first) and check that they fill `size` = (H, W) exactly.

    pycocotools trusts its input and would write outside its buffer. Raises ValueError.
    """
    try:
        codes = np.frombuffer(counts.encode("latin-1"), np.uint8).astype(np.int64) - _FIRST_CHARACTER
    except UnicodeEncodeError:
        codes = np.array([-1])
    if (wrong := np.flatnonzero((codes < 0) | (codes >= 64))).size:
        strange = next(c for c in counts[int(wrong[0]) :] if not 0 <= ord(c) - _FIRST_CHARACTER < 64)
        raise ValueError(f"mask counts have a character {strange!r} that COCO's run lengths do not use")
    # A run is a group of characters of five bits each, the lowest first; 0x20 says that the next one belongs to it.
    last = np.flatnonzero(codes & 0x20 == 0)
    if len(codes) and (not last.size or last[-1] != len(codes) - 1):
        raise ValueError("mask counts end in the middle of a run")
    first = np.concatenate([[0], last[:-1] + 1])
    lengths = last - first + 1
    if lengths.max(initial=0) > _LONGEST_GROUP:
        raise ValueError("mask counts have a run of more than 32 bits")
    places = np.arange(len(codes)) - np.repeat(first[: len(last)], lengths)
    values = np.add.reduceat((codes & 0x1F) << (5 * places), first) if last.size else codes
    values -= np.where(codes[last] & 0x10, 1 << (5 * lengths), 0)  # the sign bit of the last character
    # From the fourth run on, COCO stores the difference to the run two before.
    for begin in (1, 2):
        values[begin::2] = values[begin::2].cumsum()
    if (values < 0).any():
        raise ValueError("mask counts have a negative run")
    runs = values.tolist()
    _check_fill(size, runs)
    return runs


def _check_size(size: Sequence[int]) -> tuple[int, int]:
    """pycocotools counts pixels in 32 bits."""
    if len(size) != 2 or not all(isinstance(side, int) and not isinstance(side, bool) for side in size):
        raise ValueError("the mask's size must be two whole numbers, height and width")
    height, width = size
    if height < 1 or width < 1 or height * width >= 2**32:
        raise ValueError(f"a mask cannot have the size {height} x {width}")
    return height, width


def _check_fill(size: Sequence[int], runs: list[int]) -> None:
    height, width = _check_size(size)
    if sum(runs) != height * width:
        raise ValueError(f"mask counts cover {sum(runs)} pixels, not height x width = {height * width}")


def _with_text_counts(encoded: Any) -> dict[str, Any]:
    counts = encoded["counts"]
    text = counts.decode("ascii") if isinstance(counts, bytes) else counts
    return {"size": [int(side) for side in encoded["size"]], "counts": text}
