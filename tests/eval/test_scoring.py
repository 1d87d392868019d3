import random

import numpy as np
import pytest

from regiontower.eval.scoring import (
    restate_boxes,
    score_absent,
    score_box,
    score_grounding,
    score_phrase,
    score_text,
    summarise,
)
from regiontower.mllm.boxes import Boxes, ImageFrame, box_format

SIZE = (200, 100)
TARGET = [50.0, 25.0, 150.0, 75.0]  # [250, 250, 750, 750]
GRID = " ".join(f"[{x}, {y}, {x + 200}, {y + 300}]" for x in range(0, 900, 100) for y in (0, 250, 600))


@pytest.mark.parametrize(
    ("answer", "iou", "status"),
    [
        ("[250, 250, 750, 750]", 1.0, "boxes"),
        ("The box is [250,250,750,750], I think.", 1.0, "boxes"),
        ("[250, 250, 750, 750] [0, 0, 10, 10]", 1.0, "boxes"),
        ("[0, 0, 10, 10] [250, 250, 750, 750]", 0.0, "boxes"),  # the first counts, not the best
        ("[250, 250, 500, 750]", 0.5, "boxes"),
        ("[750, 250, 1000, 750]", 0.0, "boxes"),  # they only touch
        ("[0, 0, 1000, 1000]", 0.25, "boxes"),
        ("none", 0.0, "none"),
        ("", 0.0, "none"),
        ("the red cup", 0.0, "none"),
        ("[0.25, 0.25, 0.75, 0.75]", 0.0, "malformed"),  # another convention is not tried
        ("(0.25,0.25),(0.75,0.75)", 0.0, "none"),
        ('{"bbox_2d": [0.25, 0.25, 0.75, 0.75]}', 0.0, "malformed"),
        ("[750, 750, 250, 250]", 0.0, "malformed"),
        ("[250, 250, 750]", 0.0, "malformed"),
        ("[250, 250, 750, 99999]", 0.0, "malformed"),
        ("[250, 250, 750, 750] [1, 2", 0.0, "malformed"),  # cut off
        ("[nan, 0, 1, 1]", 0.0, "malformed"),
    ],
)
def test_one_convention_and_the_first_box(answer, iou, status):
    score = score_grounding(answer, TARGET, SIZE)
    assert score.iou == pytest.approx(iou)
    assert score.status == status
    assert score.parsed == (status == "boxes")
    assert score.correct == (iou >= 0.5)
    assert (score.predicted_xyxy is None) == (status != "boxes")


@pytest.mark.parametrize(
    ("answer", "status"),
    [("none", "none"), ("There is none.", "none"), ("[250, 250, 750, 750]", "boxes"), ("[250, 250", "malformed")],
)
def test_only_an_answer_without_any_box_rejects(answer, status):
    score = score_absent(answer, SIZE)
    assert score.status == status and score.iou == 0.0
    assert score.predicted_xyxy == (tuple(TARGET) if status == "boxes" else None)


def test_a_grid_of_27_boxes_is_judged_by_its_first():
    assert GRID.count("[") == 27
    assert score_grounding(GRID, [0.0, 0.0, 40.0, 30.0], SIZE).iou == pytest.approx(1.0)
    # The grid overlaps this target well, though not with its first box.
    assert score_grounding(GRID, [0.0, 60.0, 40.0, 90.0], SIZE).iou == 0.0


def test_iou_equals_counting_pixels():
    rng = np.random.default_rng(0)
    for _ in range(200):
        a, b = (np.concatenate([low, low + rng.integers(1, 12, 2)]) for low in rng.integers(0, 12, (2, 2)))
        rasters = []
        for x1, y1, x2, y2 in (a, b):
            raster = np.zeros((24, 24), dtype=bool)
            raster[y1:y2, x1:x2] = True
            rasters.append(raster)
        expected = (rasters[0] & rasters[1]).sum() / (rasters[0] | rasters[1]).sum()
        assert score_box(a.tolist(), b.tolist()).iou == pytest.approx(expected)


def test_scoring_never_raises():
    rng = random.Random(0)
    letters = "[](),.;:{}0123456789 -enoxyz\n\u0000é"
    for _ in range(2000):
        text = "".join(rng.choice(letters) for _ in range(rng.randrange(40)))
        score = score_grounding(text, TARGET, SIZE)
        assert 0.0 <= score.iou <= 1.0
        score_phrase(text, ["the cup"])
        score_text(text, ["Total"])


@pytest.mark.parametrize("own_format", ["norm01", "pixel", "kosmos_patch", "qwen2_5_json"])
def test_boxes_of_another_convention_are_restated(own_format):
    own, frame = box_format(own_format), ImageFrame.letterbox(SIZE, 448)
    text = own.write(Boxes([TARGET]), frame)
    parsed = own.parse(text, frame)
    restated = restate_boxes(text, parsed, own_format, SIZE)
    score = score_grounding(restated, list(parsed.boxes[0]), SIZE)
    assert score.status == "boxes"
    # Restating moves an edge by at most half a thousandth of the side.
    assert np.abs(np.subtract(score.predicted_xyxy, parsed.boxes[0])).max() <= 0.5 * 200 / 1000 + 1e-9


def test_what_one_convention_cannot_read_no_other_reads():
    own, frame = box_format("norm01"), ImageFrame.letterbox(SIZE, 448)
    text = "[250, 250, 750, 750]"  # a fine int1000 answer from a model that speaks norm01
    parsed = own.parse(text, frame)
    assert parsed.status == "malformed"
    assert score_grounding(restate_boxes(text, parsed, "norm01", SIZE), TARGET, SIZE).status == "malformed"
    nothing = own.parse("none", frame)
    assert score_grounding(restate_boxes("none", nothing, "norm01", SIZE), TARGET, SIZE).status == "none"


def test_an_answer_in_the_scored_convention_is_left_as_it_is():
    text = "well, [250,250,750,750] it is"
    parsed = box_format("int1000").parse(text, ImageFrame.identity(SIZE))
    assert restate_boxes(text, parsed, "int1000", SIZE) == text


@pytest.mark.parametrize(
    ("answer", "correct"),
    [
        ("the red cup", True),
        ("  The RED\tcup. ", True),
        ("the cup on the left", True),
        ("red cup", False),
        ("the red cup on the table", False),
        ("", False),
    ],
)
def test_phrases(answer, correct):
    assert score_phrase(answer, ["The red cup", "the cup on the left"]) is correct


@pytest.mark.parametrize(
    ("answer", "correct"),
    [("TOTAL  5.00", True), ("total 5.00\n", True), ("total 5.00.", False), ("total 500", False), ("", False)],
)
def test_transcripts(answer, correct):
    assert score_text(answer, ["Total 5.00"]) is correct


def test_summary():
    samples = [
        {"image_id": "a", "iou": 1.0, "correct": True, "parsed": True},
        {"image_id": "a", "iou": 0.25, "correct": False, "parsed": True},
        {"image_id": "b", "iou": 0.0, "correct": False, "parsed": False},
    ]
    figures = summarise("grounding", samples)
    assert figures["n"] == 3
    assert figures["acc50"] == pytest.approx(1 / 3)
    assert figures["miou"] == pytest.approx(1.25 / 3)
    assert figures["parse_rate"] == pytest.approx(2 / 3)
    assert set(figures["ci95"]) == {"acc50", "miou", "parse_rate"}
    for metric, (low, high) in figures["ci95"].items():
        assert 0.0 <= low <= figures[metric] <= high <= 1.0
    assert summarise("reading", []) == {"n": 0, "em": None, "ci95": None}
