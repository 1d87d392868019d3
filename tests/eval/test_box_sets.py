import itertools

import numpy as np
import pytest

from regiontower.eval.box_sets import score_set
from regiontower.mllm.boxes import Boxes, ParsedBoxes

A, B, C = [0, 0, 10, 10], [20, 0, 30, 10], [40, 0, 50, 10]


def parsed(*boxes):
    return ParsedBoxes("boxes", Boxes(list(boxes)))


@pytest.mark.parametrize(
    ("boxes", "targets", "found", "predicted"),
    [
        ([A, B], [B, A], 2, 2),  # the order does not matter
        ([A, A], [A, B], 1, 2),  # each box finds one thing, and one box is too many
        ([A, B, C], [A, B], 2, 3),
        ([[0, 0, 10, 5]], [A], 1, 1),  # IoU 0.5 is enough
        ([[0, 0, 10, 4.9]], [A], 0, 1),
        ([C], [A, B], 0, 1),
    ],
)
def test_what_is_found(boxes, targets, found, predicted):
    score = score_set(parsed(*boxes), targets)
    assert (score.found, score.predicted, score.true) == (found, predicted, len(targets))
    assert score.exact == (found == predicted == len(targets))
    assert score.f1 == pytest.approx(2 * found / (predicted + len(targets)))


@pytest.mark.parametrize("status", ["none", "malformed"])
def test_an_answer_without_boxes_finds_nothing(status):
    score = score_set(ParsedBoxes(status), [A])
    assert (score.found, score.predicted, score.true, score.exact) == (0, 0, 1, False)


def test_the_most_pairs_are_counted():
    """Against trying every assignment: a greedy one would find fewer where boxes overlap."""
    rng = np.random.default_rng(0)
    differs = 0
    for _ in range(300):
        boxes, targets = (
            [[x, 0, x + 10, 10] for x in rng.integers(0, 12, size=rng.integers(1, 5)).tolist()] for _ in range(2)
        )
        pairs = Boxes(boxes).iou(Boxes(targets)) >= 0.5
        count = max(len(boxes), len(targets))
        padded = np.zeros((count, count), dtype=bool)
        padded[: len(boxes), : len(targets)] = pairs
        best = max(sum(padded[i, j] for i, j in enumerate(order)) for order in itertools.permutations(range(count)))
        assert score_set(parsed(*boxes), targets).found == best
        taken, greedy = set(), 0
        for row in pairs:
            free = [j for j in np.flatnonzero(row).tolist() if j not in taken]
            greedy += bool(free)
            taken |= set(free[:1])
        differs += greedy < best
    assert differs
