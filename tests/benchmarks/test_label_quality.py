"""The measures of `bench label-quality`, by hand."""

from regiontower.benchmarks.label_quality import folded, match, met
from regiontower.train_stages.records import Region


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
