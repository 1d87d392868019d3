"""A fixed number of regions per image (RICE, section 3.2)."""

import numpy as np


def sample_regions(count: int, wanted: int, rng: np.random.Generator) -> np.ndarray:
    """Indices `(wanted,)` of the regions of one image that take part in a step.

    More regions than `wanted`: a random subset without replacement. Fewer: all of them, then more drawn with
    replacement. An image without regions gives none, `(0,)`: it contributes nothing to the loss (the paper's images all
    have regions).
    """
    if count == 0:
        return np.zeros(0, dtype=np.int64)
    if count >= wanted:
        return np.sort(rng.permutation(count)[:wanted])
    return np.concatenate([np.arange(count), rng.integers(0, count, size=wanted - count)])
