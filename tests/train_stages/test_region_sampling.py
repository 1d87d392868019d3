"""Region sampling to exactly N an image."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from regiontower.train_stages.region_sampling import sample_regions


@given(st.integers(1, 40), st.integers(1, 20), st.integers(0, 2**32 - 1))
def test_always_exactly_n_and_never_a_needless_repeat(count, wanted, seed):
    picked = sample_regions(count, wanted, np.random.default_rng(seed))
    assert len(picked) == wanted
    assert set(picked.tolist()) <= set(range(count))
    assert len(set(picked.tolist())) == wanted if count >= wanted else set(picked.tolist()) == set(range(count))


def test_an_image_without_regions_gives_none():
    assert sample_regions(0, 10, np.random.default_rng(0)).shape == (0,)


@pytest.mark.parametrize(("count", "wanted"), [(20, 5), (3, 10)])
def test_every_region_has_the_same_chance(count, wanted):
    rng = np.random.default_rng(0)
    counts = np.zeros(count)
    rounds = 4000
    for _ in range(rounds):
        np.add.at(counts, sample_regions(count, wanted, rng), 1)
    share = counts / rounds
    assert np.abs(share - wanted / count).max() < 0.1 * wanted / count


def test_repeatable():
    draws = [sample_regions(50, 10, np.random.default_rng(seed)).tolist() for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]
