"""Spherical k-means by faiss: centres of length 1, and the nearest of them."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..vision_towers.errors import UserError

MIN_POINTS = 2  # regions a centre, on average, below which clusters say nothing


def open_faiss() -> Any:
    """The module.

    Raises:
        UserError: it is not installed.
    """
    try:
        import faiss
    except ImportError as error:
        raise UserError("clustering needs faiss; install it with: pip install 'regiontower[label]'") from error
    return faiss


def refuse_too_many(clusters: int, regions: int) -> None:
    """Raise UserError when there are fewer than two regions a cluster."""
    if regions < MIN_POINTS * clusters:
        raise UserError(
            f"{regions} regions are too few for {clusters} clusters; ask for at most {regions // MIN_POINTS}."
        )


def find_centres(rows: np.ndarray, clusters: int, *, iterations: int, seed: int) -> np.ndarray:
    """`(K, D)` float32, length 1: k-means over all of `rows`, float32 `(N, D)` with N at least K. The same rows and
    seed give the same centres. GPUs are used where faiss sees some.

    Raises:
        UserError: faiss is not installed.
    """
    faiss = open_faiss()
    kmeans = faiss.Kmeans(
        rows.shape[1],
        clusters,
        niter=iterations,
        seed=seed,
        spherical=True,
        min_points_per_centroid=1,  # below it faiss only warns
        max_points_per_centroid=len(rows),
        gpu=faiss.get_num_gpus() > 0,
    )
    kmeans.train(rows)
    assert kmeans.centroids is not None
    return kmeans.centroids


def nearest_centres(rows: np.ndarray, centres: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each of `rows`, float32 `(N, D)`, the index of the centre of the largest cosine, and that cosine where rows
    have length 1: int64 and float32 `(N,)`. For centres of length 1 it is also the nearest one."""
    index = open_faiss().IndexFlatIP(centres.shape[1])
    index.add(centres)
    cosines, found = index.search(rows, 1)
    return found[:, 0], cosines[:, 0]
