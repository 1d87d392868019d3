"""95 % intervals of means and ratios over rows that come in clusters (the questions about one image are not
independent)."""

import math
from collections.abc import Hashable, Iterator, Sequence

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
    # At its ends the interval is exact; the arithmetic alone would leave 1e-17 there.
    low = centre - half if successes > 0 else 0.0
    high = centre + half if successes < trials else 1.0
    return max(0.0, low), min(1.0, high)


def mean_interval(
    values: Sequence[float], clusters: Sequence[Hashable], *, resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """95 % interval of the mean of `values`, each in [0, 1]: `ratio_interval` with every size 1."""
    return ratio_interval(values, [1.0] * len(values), clusters, resamples=resamples, seed=seed)


def ratio_interval(
    values: Sequence[float],
    sizes: Sequence[float],
    clusters: Sequence[Hashable],
    *,
    share: bool = True,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """95 % interval of sum(values) / sum(sizes), where rows of one cluster go together.

    Percentile cluster bootstrap: whole clusters (images) are drawn with replacement, the ratio is taken over all their
    rows. Where a bootstrap sees no spread (one cluster, or every row the same) it would answer with an interval of
    width zero; there the answer is Wilson's interval with the number of clusters as its number of trials, which is
    cautious: no number in [0, 1] spreads more than a coin, and no rows of a cluster say less than one.

    Args:
        values, sizes: what each row adds above and below the line; 1 below for a mean.
        clusters: the cluster (image) of each row, as long as `values`.
        share: the ratio lies in [0, 1]. A figure that does not has no such cautious answer: where the bootstrap sees no
            spread, its interval is as wide as what it saw, zero.
        resamples: number of bootstrap draws; one that draws no size at all is left out.
        seed: of the draws; the same input always gives the same interval.

    Raises:
        ValueError: no rows, lists of different length, or no size at all.
    """
    if not len(values) == len(sizes) == len(clusters) or not len(values):
        raise ValueError(f"{len(values)} values and {len(clusters)} clusters: give one cluster for each of >= 1 values")
    over, under = np.asarray(values, dtype=np.float64), np.asarray(sizes, dtype=np.float64)
    if not under.sum() > 0:
        raise ValueError("the sizes sum up to nothing")
    _, member = cluster_indices(clusters)
    sums, totals = np.bincount(member, weights=over), np.bincount(member, weights=under)
    whole, drawn_from = float(over.sum() / under.sum()), int((totals > 0).sum())
    present = under > 0
    if drawn_from == 1 or np.ptp(over[present] / under[present]) == 0.0:
        return wilson_interval(whole * drawn_from, drawn_from) if share else (whole, whole)
    found = []
    for drawn in draw_clusters(len(sums), resamples, seed):
        below = drawn @ totals
        found.append((drawn @ sums)[below > 0] / below[below > 0])
    low, high = np.percentile(np.concatenate(found), [2.5, 97.5])
    return float(low), float(high)


def cluster_indices(clusters: Sequence[Hashable]) -> tuple[int, np.ndarray]:
    """The number of clusters, and for each row the index of its cluster, in order of first appearance."""
    names = {name: index for index, name in enumerate(dict.fromkeys(clusters))}
    return len(names), np.asarray([names[name] for name in clusters])


def draw_clusters(count: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Bootstrap draws of `count` clusters in pieces: `(draws, count)`, how often each cluster was drawn."""
    rng = np.random.default_rng(seed)
    chunk = max(1, _CHUNK_CELLS // count)
    for start in range(0, resamples, chunk):
        yield rng.multinomial(count, np.full(count, 1 / count), size=min(chunk, resamples - start))
