"""Masks of an image, as the share of each patch of a view that they cover."""

import numpy as np

from ..mllm.boxes import ImageFrame


def patch_coverage(mask: np.ndarray, frame: ImageFrame, patch_size: int) -> np.ndarray:
    """`(rows, columns)` float32 in 0..1: the share of the area of each patch of the view that the mask covers, exactly.

    mask: (height, width) bool, in pixels of the original image. frame: original -> view. patch_size: pixels of the
    view; what is left over at the right and at the bottom is no patch.

    The running sum A(y, x) of the mask over [0, y] x [0, x] is linear between pixel edges in y and in x, so A between
    pixels is interpolated, and the share of the patch [y, y'] x [x, x'] is
    (A(y', x') - A(y, x') - A(y', x) + A(y, x)) / ((y' - y) (x' - x)).
    """
    height, width = mask.shape
    running = np.zeros((height + 1, width + 1))
    running[1:, 1:] = mask.cumsum(0, dtype=np.int64).cumsum(1)
    x_edges, y_edges = (
        (np.arange(frame.input_size[axis] // patch_size + 1) * patch_size - frame.offset[axis]) / frame.scale[axis]
        for axis in (0, 1)
    )
    at_edges = _between(y_edges, height) @ running @ _between(x_edges, width).T
    covered = np.diff(np.diff(at_edges, axis=0), axis=1)
    share = covered / (np.diff(y_edges)[:, None] * np.diff(x_edges)[None])
    return np.clip(share, 0.0, 1.0).astype(np.float32)


def _between(edges: np.ndarray, length: int) -> np.ndarray:
    """`(n, length + 1)`: row i takes a value at `edges[i]` from values at 0 .. length; outside is as at the end."""
    place = np.clip(edges, 0.0, length)
    low = np.minimum(place.astype(np.int64), length - 1)
    weights = np.zeros((len(edges), length + 1))
    rows = np.arange(len(edges))
    weights[rows, low + 1] = place - low
    weights[rows, low] = 1.0 - (place - low)
    return weights
