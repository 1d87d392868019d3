"""Neighbours and logistic regression, beside slow twins."""

import numpy as np
import pytest

from regiontower.eval.probe import classify
from regiontower.eval.probe.classify import linear, majority, nearest_neighbours, share
from regiontower.eval.probe.regions import ProbeRegions


def regions(count: int, seed: int, spread: float = 1.0) -> ProbeRegions:
    """Three classes about three directions."""
    rng = np.random.default_rng(seed)
    classes = rng.integers(0, 3, count)
    features = np.eye(3, 8)[classes] * 2 + rng.normal(size=(count, 8)) * spread
    return ProbeRegions(features.astype(np.float32), classes, np.arange(count) // 2)


@pytest.mark.parametrize("neighbours", [1, 5, 500])
def test_neighbours_vote_by_their_cosine(monkeypatch, neighbours):
    monkeypatch.setattr(classify, "NEIGHBOURS", neighbours)
    train, test = regions(60, 0), regions(40, 1)
    right = []
    for feature, label in zip(test.features, test.classes, strict=True):
        cosine = train.features @ feature / np.linalg.norm(train.features, axis=1) / np.linalg.norm(feature)
        votes = np.zeros(3)
        for index in np.argsort(-cosine)[:neighbours]:
            votes[train.classes[index]] += np.exp(cosine[index] / 0.07)
        right.append(votes.argmax() == label)
    found = nearest_neighbours(train, test)
    assert found.n == 40 and found.value == pytest.approx(np.mean(right))
    assert 0.4 < found.value < 1 and found.ci95[0] < found.value < found.ci95[1]


def test_a_linear_head_finds_what_is_separable_and_no_more():
    assert linear(regions(300, 0, 0.1), regions(100, 1, 0.1)).value == 1
    train, test = regions(300, 0), regions(100, 1)
    shuffled = ProbeRegions(train.features, np.random.default_rng(0).permutation(train.classes), train.images)
    assert linear(train, test).value > 0.75 and linear(shuffled, test).value < 0.6


def test_the_mean_over_classes_weighs_a_rare_class_as_much():
    classes = np.array([0] * 9 + [1])
    found = share(classes == 0, np.arange(10), classes)
    assert found.value == 0.9 and found.class_mean == 0.5
    test = ProbeRegions(np.zeros((10, 2), np.float32), classes, np.arange(10))
    assert majority(test, test).value == 0.9


def test_nothing_to_ask_is_no_figure():
    none = ProbeRegions(np.zeros((0, 1), np.float32), np.zeros(0, int), np.zeros(0, int))
    for probe in (nearest_neighbours, linear, majority):
        assert probe(regions(5, 0), none).row() == {"n": 0}
        assert probe(none, regions(5, 0)).row() == {"n": 0}
    one = ProbeRegions(np.ones((3, 2), np.float32), np.ones(3, int), np.arange(3))
    assert linear(one, one).value == 1  # a single class is no problem for a regression
