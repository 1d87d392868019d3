"""K-means: centres for known seeds do not change, and the nearest centre is the nearest."""

import numpy as np
import pytest

from regiontower.train_stages.kmeans import find_centres, nearest_centres, refuse_too_many
from regiontower.vision_towers.errors import UserError

faiss = pytest.importorskip("faiss", reason="clusters need faiss")


def unit_rows(count, width=24, seed=0):
    rows = np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.mark.parametrize("count, clusters, seed", [(200, 7, 0), (64, 32, 3), (900, 2, 11)])
def test_centres_and_labels_are_to_the_bit_those_of_earlier_versions(count, clusters, seed):
    """The lines that `region_clusters` had before both callers shared one function."""
    features = unit_rows(count, seed=seed)
    kmeans = faiss.Kmeans(
        features.shape[1], clusters, niter=20, seed=seed, spherical=True, max_points_per_centroid=count
    )
    kmeans.train(features)
    labels = kmeans.index.search(features, 1)[1][:, 0]
    centres = find_centres(features, clusters, iterations=20, seed=seed)
    np.testing.assert_array_equal(centres, kmeans.centroids)
    np.testing.assert_array_equal(nearest_centres(features, centres)[0], labels)


def test_the_largest_cosine_is_the_smallest_distance():
    rows, centres = unit_rows(300, seed=1), unit_rows(20, seed=2)
    found, cosines = nearest_centres(rows, centres)
    distances = np.linalg.norm(rows[:, None] - centres, axis=-1)
    np.testing.assert_array_equal(found, distances.argmin(axis=1))
    np.testing.assert_allclose(2 - 2 * cosines, distances.min(axis=1) ** 2, atol=1e-5)


def test_too_few_regions_are_refused():
    refuse_too_many(5, 10)
    with pytest.raises(UserError, match="9 regions are too few for 5 clusters; ask for at most 4"):
        refuse_too_many(5, 9)
