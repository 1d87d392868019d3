"""95 % intervals of figures that are no means of rows: those made of counts that are summed over images."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

RESAMPLES = 1000
_CELLS = 4_000_000  # how many resampled counts are held at once


def image_interval(
    counts: np.ndarray, figure: Callable[[np.ndarray], np.ndarray], seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap over images.

    Args:
        counts: `(N, ...)`, the counts of each image. figure: `(R, ...)` of sums of counts to `(R,)`, in 0..1; a draw in
            which there is nothing to count (NaN) is passed over.
    Of one image nothing is known: (0, 1). A class that only few images show is missing in many draws; the interval of a
    mean over such classes is rough.
    """
    images = len(counts)
    if images < 2:
        return 0.0, 1.0
    flat, rng, found = counts.reshape(images, -1), np.random.default_rng(seed), []
    chunk = max(1, _CELLS // max(images, flat.shape[1]))
    for start in range(0, RESAMPLES, chunk):
        size = min(chunk, RESAMPLES - start)
        drawn = rng.multinomial(images, np.full(images, 1 / images), size=size)  # how often each image was drawn
        found.append(figure((drawn @ flat).reshape(size, *counts.shape[1:])))
    low, high = np.nanpercentile(np.concatenate(found), [2.5, 97.5])
    return float(low), float(high)
