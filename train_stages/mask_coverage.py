"""Masks of an image, as the share of each patch of a view that they cover."""

import numpy as np

from ..mllm.boxes import ImageFrame


def patch_coverage(mask: np.ndarray, frame: ImageFrame, patch_size: int) -> np.ndarray:
    """`(rows, columns)` float32 in 0..1: the share of the area of each patch of the view that the mask covers, exactly.

    mask: (height, width) bool, in pixels of the original image. frame: original -> view. patch_size: pixels of the
    view; what is left over at the right and at the bottom is no patch.

    A patch covers of the pixel (y, x) the product of two overlaps, of rows and of columns, so the shares are
    Y mask X^T, with the overlaps of `_overlaps`.
    """
    down, across = (
        (np.arange(frame.input_size[axis] // patch_size + 1) * patch_size - frame.offset[axis]) / frame.scale[axis]
        for axis in (1, 0)
    )
    share = _overlaps(down, mask.shape[0]) @ mask.astype(np.float64) @ _overlaps(across, mask.shape[1]).T
    return np.clip(share, 0.0, 1.0).astype(np.float32)


def _overlaps(edges: np.ndarray, length: int) -> np.ndarray:
    """`(n, length)`: which share of [edges[i], edges[i + 1]] lies in the pixel [p, p + 1]; nothing lies outside."""
    pixel, start, end = np.arange(length), edges[:-1, None], edges[1:, None]
    return np.clip(np.minimum(end, pixel + 1) - np.maximum(start, pixel), 0.0, None) / (end - start)
