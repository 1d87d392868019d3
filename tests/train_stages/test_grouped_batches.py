"""Batches of samples that are alike."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from regiontower.train_stages.grouped_batches import group_batches

samples = st.lists(st.tuples(st.integers(1, 999), st.booleans()), min_size=1, max_size=20)


def padded(lengths, batches):
    return sum(len(batch) * max(lengths[index] for index in batch) for batch in batches)


@given(samples, st.integers(1, 6), st.integers(0, 9))
def test_every_sample_is_in_one_batch_and_at_most_one_batch_is_mixed(drawn, batch, seed):
    drawn = drawn * batch  # whole batches
    lengths, shown = [length for length, _ in drawn], [picture for _, picture in drawn]
    batches = group_batches(lengths, shown, batch, random.Random(seed))
    assert sorted(index for members in batches for index in members) == list(range(len(drawn)))
    assert all(len(members) == batch for members in batches)
    assert sum(len({shown[index] for index in members}) > 1 for members in batches) <= 1
    assert batches == group_batches(lengths, shown, batch, random.Random(seed))


def test_hardly_anything_is_padding_and_the_order_is_random():
    rng = random.Random(0)
    lengths = [int(rng.lognormvariate(4, 1)) + 64 for _ in range(512)]
    shown = [rng.random() < 0.8 for _ in lengths]
    in_order = [list(range(start, start + 8)) for start in range(0, 512, 8)]
    batches = group_batches(lengths, shown, 8, random.Random(1))
    assert padded(lengths, batches) < 1.1 * sum(lengths) < padded(lengths, in_order) / 1.3
    means = [sum(lengths[index] for index in members) for members in batches]
    assert means != sorted(means) and means != sorted(means, reverse=True)
    longest_first = sum(max(members, key=lambda i: lengths[i]) == members[0] for members in batches)
    assert 0 < longest_first < len(batches) / 2  # the first process does not always get the longest


def test_what_makes_no_whole_batches_is_refused():
    with pytest.raises(ValueError, match="3 samples do not make whole batches of 2"):
        group_batches([1, 2, 3], [True] * 3, 2, random.Random(0))
