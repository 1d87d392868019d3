"""95 % intervals of a mean over rows that come in clusters (the questions about one image are not independent)."""

import math
from collections.abc import Hashable, Sequence

import numpy as np

_Z = 1.959963984540054  # the 97.5 % point of the normal distribution
_CHUNK_CELLS = 4_000_000  # how many image counts are held at once


def wilson_interval(successes: float, trials: int) -> tuple[float, float]:
    """Wilson's 95 % score interval of a proportion.

    Args:
        successes: number of successes, 0..trials; need not be whole.
        trials: number of independent trials, at least 1.
    """
    share = successes / trials
    spread = _Z * _Z / trials
    centre = (share + spread / 2) / (1 + spread)
    half = _Z / (1 + spread) * math.sqrt(share * (1 - share) / trials + spread / (4 * trials))
    return max(0.0, centre - half), min(1.0, centre + half)


def mean_interval(
    values: Sequence[float], clusters: Sequence[Hashable], *, resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """95 % interval of the mean of `values`, each in [0, 1], where rows of one cluster go together.

    Percentile cluster bootstrap: whole clusters (images) are drawn with replacement, the mean is taken over all their
    rows. Where a bootstrap sees no spread (one cluster, or every value the same) it would answer with an interval of
    width zero; there the answer is Wilson's interval with the number of clusters as its number of trials, which is
    cautious: no number in [0, 1] spreads more than a coin, and no rows of a cluster say less than one.

    Args:
        values: the score of each row.
        clusters: the cluster (image) of each row, as long as `values`.
        resamples: number of bootstrap draws.
        seed: of the draws; the same input always gives the same interval.

    Raises:
        ValueError: no rows, or lists of different length.
    """
    if len(values) != len(clusters) or not len(values):
        raise ValueError(f"{len(values)} values and {len(clusters)} clusters: give one cluster for each of >= 1 values")
    scores = np.asarray(values, dtype=np.float64)
    names = {name: index for index, name in enumerate(dict.fromkeys(clusters))}
    member = np.asarray([names[name] for name in clusters])
    if len(names) == 1 or np.ptp(scores) == 0.0:
        return wilson_interval(float(scores.mean()) * len(names), len(names))
    sums = np.bincount(member, weights=scores)
    sizes = np.bincount(member)
    rng = np.random.default_rng(seed)
    means = []
    chunk = max(1, _CHUNK_CELLS // len(names))
    for start in range(0, resamples, chunk):
        drawn = rng.multinomial(
            len(names), np.full(len(names), 1 / len(names)), size=min(chunk, resamples - start)
        )  # (draws, clusters): how often each cluster was drawn
        means.append((drawn @ sums) / (drawn @ sizes))
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5])
    return float(low), float(high)
