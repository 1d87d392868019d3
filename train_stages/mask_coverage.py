"""Masks of an image, as the share of each patch of a view that they cover."""

import numpy as np

from ..mllm.boxes import ImageFrame
from .records import Mask


def patch_coverage(mask: Mask, frame: ImageFrame, patch_size: int) -> np.ndarray:
    """`(rows, columns)` float32 in 0..1: the share of the area of each patch of the view that the mask covers, exactly.

    mask: of the original image. frame: original -> view. patch_size: pixels of the view; what is left over at the right
    and at the bottom is no patch.

    The mask is made of vertical strips, one pixel wide. A patch covers of a strip the product of two overlaps, of its
    rows and of its column, so the shares are Y X^T with a column for each strip in Y and in X. No pixel is looked at: a
    photograph costs no more than its outlines.
    """
    top, bottom, column = _strips(np.array(mask.runs()), mask.size[0])
    down, across = (
        (np.arange(frame.input_size[axis] // patch_size + 1) * patch_size - frame.offset[axis]) / frame.scale[axis]
        for axis in (1, 0)
    )
    share = _overlaps(down, top, bottom) @ _overlaps(across, column, column + 1).T
    return np.clip(share, 0.0, 1.0).astype(np.float32)


def _strips(runs: np.ndarray, height: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of run lengths (background first, down one column after the other): where each strip begins and ends in its
    column, and the column."""
    end = runs.cumsum()
    begin, end = (end - runs)[1::2], end[1::2]
    begin, end = begin[begin < end], end[begin < end]
    columns = (end - 1) // height - begin // height + 1  # that a run goes through
    first_strip = np.repeat(columns.cumsum() - columns, columns)
    column = np.repeat(begin // height, columns) + np.arange(len(first_strip)) - first_strip
    top = np.maximum(np.repeat(begin, columns) - column * height, 0)
    bottom = np.minimum(np.repeat(end, columns) - column * height, height)
    return top, bottom, column


def _overlaps(edges: np.ndarray, begin: np.ndarray, end: np.ndarray) -> np.ndarray:
    """`(n, strips)`: which share of [edges[i], edges[i + 1]] lies in [begin, end]."""
    low, high = edges[:-1, None], edges[1:, None]
    return np.clip(np.minimum(high, end) - np.maximum(low, begin), 0.0, None) / (high - low)
