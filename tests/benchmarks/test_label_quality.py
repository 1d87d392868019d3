"""The measures of `bench label-quality`, by hand."""

import pytest

from regiontower.benchmarks.label_quality import any_meets, folded, match, met, record_recall, shuffled
from regiontower.train_stages.cluster_quality import cluster_quality
from regiontower.train_stages.records import Record, Region


def region(*box, ocr=None):
    return Region(box_xyxy=box, ocr=ocr)


def test_each_region_has_one_partner_and_the_best_overlap_comes_first():
    drawn = [region(0, 0, 10, 10, ocr="a"), region(20, 0, 30, 10, ocr="b"), region(50, 50, 60, 60, ocr="c")]
    found = [region(0, 0, 10, 7, ocr="worse"), region(0, 0, 10, 9, ocr="a"), region(20, 0, 30, 5.1, ocr="b")]
    pairs = [(one.ocr, other.ocr) for one, other in match(drawn, found)]
    assert pairs == [("a", "a"), ("b", "b")]
    assert match(drawn, []) == [] == match([], found)


def test_recall_by_number_of_proposals():
    boxes = [(100.0 + 20 * i, 0.0, 110.0 + 20 * i, 10.0) for i in range(11)] + [(0.0, 0.0, 10.0, 10.0)]
    scores = [1.0] * 11 + [0.5]  # the one that counts is the twelfth
    assert met([region(0, 0, 10, 10), region(500, 0, 510, 10)], boxes, scores) == [
        [False, True, True, True],
        [False, False, False, False],
    ]


def test_folded_texts():
    assert folded("Tel : 03") == folded("TEL:03") != folded(None)


def test_a_region_is_met_by_any_box():
    drawn = [region(0, 0, 10, 10), region(20, 0, 30, 10)]
    assert any_meets(drawn, [(0, 0, 10, 6), (40, 0, 50, 10)]) == [True, False]
    assert any_meets(drawn, []) == [False, False]


def test_clusters_dealt_out_at_random_agree_with_nothing():
    """Two clusters that are the two categories: 1 and 1; at random, half of the regions and nearly nothing."""
    regions = [
        Region(box_xyxy=(0, 0, 9, 9), category="ab"[number % 2], cluster=number % 2) for number in range(200)
    ] + [Region(box_xyxy=(0, 0, 9, 9), category="a")]
    records = [Record(image="a.png", width=9, height=9, regions=regions)]
    found = cluster_quality(records)
    assert (found["purity"], found["nmi"]) == (1.0, pytest.approx(1.0))
    dealt = shuffled(records)
    assert 0.5 <= dealt["purity"] < 0.6 and 0 <= dealt["nmi"] < 0.05


def test_record_boxes_that_the_filters_keep(shared_data):
    """Of the first photographs: a large box is nearly always kept, a small one never."""
    pytest.importorskip("faiss")
    found = record_recall(shared_data, 6, "nano")
    assert found["large"]["boxes"] > 3 and found["large"]["recall"] > 0.8
    assert found["all"]["recall"] < found["large"]["recall"]
