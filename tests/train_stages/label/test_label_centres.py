"""K-means in two levels: how the centres are shared out, what they are worth, and that a kill costs nothing."""

import numpy as np
import pytest

from regiontower.train_stages.kmeans import find_centres, nearest_centres
from regiontower.train_stages.label.branched_kmeans import branched_centres, share_out
from regiontower.train_stages.label.centres import Centres, KMeansConfig
from regiontower.vision_towers.errors import UserError

pytest.importorskip("faiss", reason="clusters need faiss")
WIDTH = 16


def groups(count, each, spread=0.05, seed=0):
    """`each` rows around each of `count` directions, and the directions."""
    rng = np.random.default_rng(seed)
    middles = rng.normal(size=(count, WIDTH))
    middles /= np.linalg.norm(middles, axis=1, keepdims=True)
    rows = np.repeat(middles, each, axis=0) + rng.normal(size=(count * each, WIDTH)) * spread
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32), middles.astype(np.float32)


def in_shards(rows, shards=7):
    """As `branched_centres` wants them."""

    def samples(share):
        for index, some in enumerate(np.array_split(rows, shards)):
            chosen = np.random.default_rng((0, index)).random(len(some)) < share
            yield some if share == 1 else some[chosen]

    return samples


@pytest.mark.parametrize(
    "counts, clusters, wanted",
    [
        ([100, 300], 4, [1, 3]),
        ([10, 10, 10], 4, [2, 1, 1]),
        ([1, 1000], 10, [0, 10]),
        ([3, 0, 5], 8, [3, 0, 5]),  # as many as there are rows
        ([2, 90, 3], 90, [2, 85, 3]),
        ([1, 1, 1, 7], 3, [0, 0, 1, 2]),
    ],
)
def test_centres_are_shared_out_by_rows(counts, clusters, wanted):
    found = share_out(counts, clusters)
    assert sum(found) == clusters and all(given <= count for given, count in zip(found, counts, strict=True))
    assert sum(abs(a - b) for a, b in zip(found, wanted, strict=True)) <= 2  # ties and caps may go elsewhere


def test_two_levels_group_nearly_as_tightly_as_one(tmp_path):
    """The mean cosine of rows to their centres, beside flat k-means and beside random rows as centres."""
    rows, _ = groups(60, 40, spread=0.15)
    centres, branches = branched_centres(in_shards(rows), len(rows), 60, 8, 256, 20, 0, tmp_path / "scratch")
    assert centres.shape == (60, WIDTH) and branches.shape == (8, WIDTH)
    np.testing.assert_allclose(np.linalg.norm(centres, axis=1), 1, rtol=1e-3)
    flat = find_centres(rows, 60, iterations=20, seed=0)
    guessed = rows[np.random.default_rng(0).choice(len(rows), 60, replace=False)]
    tight = [nearest_centres(rows, each)[1].mean() for each in (centres, flat, guessed)]
    assert tight[0] > tight[2] + 0.02 and tight[0] > tight[1] - 0.02


def test_probing_some_branches_finds_nearly_always_the_nearest(tmp_path):
    rows, _ = groups(60, 40, spread=0.15)
    centres, branches = branched_centres(in_shards(rows), len(rows), 120, 12, 256, 20, 0, tmp_path / "scratch")
    exact, cosines = nearest_centres(rows, centres)
    found, near = Centres(centres, branches, probes=4).nearest(rows)
    assert (found == exact).mean() > 0.95
    assert (near <= cosines + 1e-5).all()
    np.testing.assert_array_equal(Centres(centres, branches, probes=12).nearest(rows)[0], exact)
    one = Centres(centres, branches, probes=1).nearest(rows)[0]
    assert (one == exact).mean() < (found == exact).mean()  # probing does something


def test_a_row_whose_branch_has_no_centre_still_has_a_nearest():
    branches = np.eye(4, dtype=np.float32)
    centres = branches[1:3]
    found, cosines = Centres(centres, branches, probes=1).nearest(np.array([[1, 0.1, 0, 0]], np.float32))
    assert found.tolist() == [0] and cosines[0] == pytest.approx(0.1)


def test_what_is_finished_is_kept_and_nothing_else_changes(tmp_path):
    """Broken off after each branch in turn: the same bits, and no branch twice."""
    rows, _ = groups(20, 30, spread=0.2)
    settings = (len(rows), 40, 5, 256, 10, 0)
    wanted = branched_centres(in_shards(rows), *settings, tmp_path / "whole")[0]

    class Killed(Exception):
        pass

    def killed_after(count):
        left = iter(range(count))

        def on_branch():
            if next(left, None) is None:
                raise Killed

        return on_branch

    for count in range(5):
        scratch = tmp_path / str(count)
        with pytest.raises(Killed):
            branched_centres(in_shards(rows), *settings, scratch, killed_after(count))
        before = {path.name: path.stat().st_mtime_ns for path in scratch.glob("*.npy")}
        assert len(before) == 1 + count + 1
        np.testing.assert_array_equal(branched_centres(in_shards(rows), *settings, scratch)[0], wanted)
        assert all((scratch / name).stat().st_mtime_ns == time for name, time in before.items())


def test_no_more_branches_than_clusters():
    with pytest.raises(UserError, match="between 1 and the 4 clusters"):
        KMeansConfig(4, branches=5)
