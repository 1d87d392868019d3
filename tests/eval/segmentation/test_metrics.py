"""mIoU and panoptic quality against twins that go pixel by pixel."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from regiontower.eval.segmentation import (
    PanopticMap,
    class_iou,
    class_quality,
    confusion,
    mean_iou,
    panoptic_counts,
    panoptic_quality,
    pixel_counts,
)
from regiontower.eval.segmentation.figures import constant_miou, panoptic_figures, pixel_accuracy, semantic_figures
from regiontower.eval.segmentation.interval import image_interval
from regiontower.eval.segmentation.label_maps import VOID

CLASSES = 3
labels = st.lists(st.integers(VOID, CLASSES - 1), min_size=12, max_size=12).map(lambda row: np.array(row).reshape(3, 4))


@given(st.lists(st.tuples(labels, labels), min_size=1, max_size=3))
def test_miou_is_the_mean_of_ious_over_all_pixels(images):
    counts = sum(pixel_counts(confusion(*image, CLASSES)) for image in images)
    pixels = [
        (truth[y, x], predicted[y, x])
        for truth, predicted in images
        for y, x in itertools.product(range(3), range(4))
        if truth[y, x] != VOID
    ]
    ious = []
    for label in range(CLASSES):
        both = sum(t == label and p == label for t, p in pixels)
        either = sum(t == label or p == label for t, p in pixels)
        expected = both / either if either else np.nan
        np.testing.assert_allclose(class_iou(counts)[label], expected)
        ious += [expected] if either else []
    np.testing.assert_allclose(mean_iou(counts), np.mean(ious) if ious else np.nan)
    right = np.mean([t == p for t, p in pixels]) if pixels else np.nan
    np.testing.assert_allclose(pixel_accuracy(counts), right)


@given(labels)
def test_the_best_constant_answer(truth):
    answers = [pixel_counts(confusion(truth, np.full_like(truth, label), CLASSES)) for label in range(CLASSES)]
    # An answer that is nowhere in the truth is 0 in a mean over one class more.
    best = np.nan if (truth == VOID).all() else max(float(mean_iou(counts)) for counts in answers)
    np.testing.assert_allclose(constant_miou(answers[0]), best)


@st.composite
def maps(draw, crowds: bool):
    segment = np.array(draw(st.lists(st.integers(VOID, 4), min_size=20, max_size=20))).reshape(4, 5)
    left = np.unique(segment[segment != VOID]).tolist()
    segment = np.array([*(left.index(i) if i in left else 0 for i in range(5)), VOID])[segment]
    kinds = draw(st.lists(st.integers(0, CLASSES - 1), min_size=len(left), max_size=len(left)))
    many = draw(st.lists(st.booleans(), min_size=len(left), max_size=len(left))) if crowds else [False] * len(left)
    return PanopticMap(segment, tuple(kinds), tuple(many))


def pixel_sets(given):
    return [set(np.flatnonzero(given.segment.ravel() == place).tolist()) for place in range(len(given.classes))]


def slow_counts(truth, predicted):
    """The paper's section 4, with sets of pixels."""
    counts = np.zeros((CLASSES, 4))
    void = set(np.flatnonzero(truth.segment.ravel() == VOID).tolist())
    true, found = pixel_sets(truth), pixel_sets(predicted)
    partners = set()
    for g, p in itertools.product(range(len(true)), range(len(found))):
        if truth.classes[g] == predicted.classes[p] and not truth.crowd[g]:
            iou = len(true[g] & found[p]) / len(true[g] | (found[p] - void))
            if iou > 0.5:
                assert not {("g", g), ("p", p)} & partners  # nobody has two
                partners |= {("g", g), ("p", p)}
                counts[truth.classes[g], :2] += iou, 1
    for g in range(len(true)):
        if ("g", g) not in partners and not truth.crowd[g]:
            counts[truth.classes[g], 3] += 1
    for p, label in enumerate(predicted.classes):
        ignored = void.union(*(true[g] for g in range(len(true)) if truth.crowd[g] and truth.classes[g] == label))
        if ("p", p) not in partners and len(found[p] & ignored) <= len(found[p]) / 2:
            counts[label, 2] += 1
    return counts


@given(maps(crowds=True), maps(crowds=False))
def test_panoptic_counts_are_the_papers(truth, predicted):
    np.testing.assert_allclose(panoptic_counts(truth, predicted, CLASSES), slow_counts(truth, predicted))
    for own in (truth, predicted):
        perfect = panoptic_counts(PanopticMap(own.segment, own.classes, (False,) * len(own.classes)), own, CLASSES)
        assert not perfect[:, 2:].any() and np.array_equal(perfect[:, 0], perfect[:, 1])


def strip(text: str, classes: str, crowd: str = "") -> PanopticMap:
    """A map of one row: "aab." has segments a and b and a void pixel, of the classes that follow in order."""
    names = sorted(set(text) - {"."})
    segment = np.array([[VOID if letter == "." else names.index(letter) for letter in text]])
    return PanopticMap(segment, tuple(map(int, classes)), tuple(name in crowd for name in names))


@pytest.mark.parametrize(
    ("truth", "answer", "expected"),
    [
        (strip("aaaabb..", "01"), strip("aaaabb..", "01"), [[1, 1, 0, 0], [1, 1, 0, 0]]),
        (strip("aaaabb..", "01"), strip("aaa.bbbb", "01"), [[0.75, 1, 0, 0], [1, 1, 0, 0]]),  # void costs nothing
        (strip("aaaabbbb", "01"), strip("aabbbbbb", "01"), [[0, 0, 1, 1], [4 / 6, 1, 0, 0]]),  # one half is too little
        (strip("aaaabbbb", "01"), strip("aaaabbbb", "00"), [[1, 1, 1, 0], [0, 0, 0, 1]]),  # another class
        (strip("aaaa....", "0"), strip("aaaa.bbb", "01"), [[1, 1, 0, 0], [0, 0, 0, 0]]),  # in the void
        (strip("aaaabbbb", "00", "b"), strip("aaaabbcc", "000"), [[1, 1, 0, 0], [0, 0, 0, 0]]),  # in a crowd
        (strip("aaaabbbb", "00", "b"), strip("aaaabbcc", "011"), [[1, 1, 0, 0], [0, 0, 2, 0]]),  # of another class
        (strip("aaaabbbb", "01"), strip("....bbbb", "1"), [[0, 0, 0, 1], [1, 1, 0, 0]]),  # no answer is a miss
    ],
)
def test_void_crowds_and_misses(truth, answer, expected):
    found = panoptic_counts(truth, answer, 2)
    np.testing.assert_allclose(found, expected)


def test_quality_is_a_product_and_a_mean_over_classes_that_are_there():
    counts = np.array([[1.5, 2, 1, 1], [0, 0, 0, 2], [0, 0, 0, 0]])
    np.testing.assert_allclose(class_quality(counts)[:2], [[1.5 / 3, 0.75, 2 / 3], [0, 0, 0]])
    assert np.isnan(class_quality(counts)[2]).all()
    np.testing.assert_allclose(panoptic_quality(counts), [0.25, 0.375, 1 / 3])


def test_figures_say_over_how_many_classes():
    semantic = np.array([[[8, 0, 2], [0, 2, 0], [0, 0, 0]], [[2, 0, 0], [3, 0, 3], [0, 0, 0]]])
    found = semantic_figures(semantic, {"seen": [0], "unseen": [1, 2], "none": [2]})
    assert set(found) == {"miou", "miou_seen", "miou_unseen", "pixel_accuracy", "miou_constant"}
    assert found["miou"]["value"] == pytest.approx((10 / 12 + 3 / 8) / 2) and found["miou"]["classes"] == 2
    assert found["miou_seen"]["value"] == pytest.approx(10 / 12) and found["miou_unseen"]["value"] == 3 / 8
    assert found["miou_constant"]["value"] == pytest.approx(12 / 18 / 2)
    panoptic = np.array([[[1.5, 2, 1, 1], [0, 0, 0, 2]]])
    found = panoptic_figures(panoptic, {"things": [1], "stuff": []})
    assert found["pq"]["value"] == pytest.approx(0.25) and found["pq_things"]["value"] == 0
    assert found["pq"]["ci95"] == [0, 1] and set(found) == {"pq", "sq", "rq", "pq_things"}


def test_intervals_are_over_images():
    one = np.array([[[9, 0, 1]], [[1, 0, 9]], [[5, 2, 3]], [[10, 0, 0]]])
    low, high = image_interval(one, mean_iou)
    assert low < mean_iou(one.sum(0)) < high and image_interval(one, mean_iou) == (low, high)
    many = np.concatenate([one] * 25)
    narrow = image_interval(many, mean_iou)
    assert narrow[1] - narrow[0] < (high - low) / 3
