"""How well clusters agree with names that they have never seen."""

from collections import Counter
from collections.abc import Iterable

import numpy as np

from .records import Record
from .region_labels import tagged_name


def cluster_quality(records: Iterable[Record], seed: int = 0) -> dict[str, float]:
    """Agreement of the regions' clusters with their tags and category ("red star"), over regions that have both.

    Returns `regions`, `names`, `clusters` (how many occur), `purity` (share of regions whose name is the most frequent
    of their cluster), `random_purity` (the same after shuffling, which many small clusters raise) and `nmi` (normalised
    mutual information, scikit-learn's).
    """
    from sklearn.metrics import normalized_mutual_info_score

    pairs = [
        (region.cluster, name)
        for record in records
        for region in record.regions
        if region.cluster is not None and (name := tagged_name(region)) is not None
    ]
    if not pairs:
        return {"regions": 0}
    clusters, names = [cluster for cluster, _ in pairs], [name for _, name in pairs]
    shuffled = np.random.default_rng(seed).permutation(clusters).tolist()
    return {
        "regions": len(pairs),
        "names": len(set(names)),
        "clusters": len(set(clusters)),
        "purity": _purity(clusters, names),
        "random_purity": _purity(shuffled, names),
        "nmi": float(normalized_mutual_info_score(names, clusters)),
    }


def _purity(clusters: list[int], names: list[str]) -> float:
    found: dict[int, Counter] = {}
    for cluster, name in zip(clusters, names, strict=True):
        found.setdefault(cluster, Counter())[name] += 1
    return sum(max(counts.values()) for counts in found.values()) / len(names)
