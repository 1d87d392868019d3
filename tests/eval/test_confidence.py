import numpy as np
import pytest
from PIL import Image

from regiontower.eval.confidence import (
    average_precision,
    confidence_figures,
    expected_calibration_error,
    plot_calibration,
    reliability,
    scored_boxes,
)

TRUE, WRONG = [0, 0, 10, 10], [50, 50, 60, 60]


def sample(boxes, scores, true, image="a"):
    return {"boxes": boxes, "box_scores": scores, "true_boxes": true, "image_id": image}


def slow_average_precision(samples):
    """Every threshold by itself: area under the best precision at each recall or beyond."""
    total = sum(len(row["true_boxes"]) for row in samples)
    thresholds = sorted({score for row in samples for score in row["box_scores"] or []}, reverse=True)
    points = []
    for threshold in thresholds:
        hits = given = 0
        for row in samples:
            left = [list(box) for box in row["true_boxes"]]
            kept = [(s, b) for s, b in zip(row["box_scores"] or [], row["boxes"], strict=False) if s >= threshold]
            for _, box in sorted(kept, key=lambda item: -item[0]):
                given += 1
                if box in left:
                    left.remove(box)
                    hits += 1
        points.append((hits / total, hits / given))
    area = last = 0.0
    for position, (recall, _) in enumerate(points):
        area += (recall - last) * max(precision for _, precision in points[position:])
        last = recall
    return area


def test_against_every_threshold_by_itself():
    rng = np.random.default_rng(0)
    places = [[x, 0, x + 10, 10] for x in range(0, 200, 20)]
    for _ in range(40):
        samples = []
        for row in range(12):
            true = [places[i] for i in rng.choice(10, size=rng.integers(1, 4), replace=False)]
            given = [places[i] for i in rng.integers(0, 10, size=rng.integers(0, 5))]
            scores = rng.permutation(1000)[: len(given)] / 1000 + row * 1e-5  # no two alike
            samples.append(sample(given, scores.tolist() or None, true, image=row // 2))
        found = scored_boxes(samples)
        assert average_precision(found) == pytest.approx(slow_average_precision(samples))


def test_a_second_box_on_the_same_thing_is_wrong():
    found = scored_boxes([sample([TRUE, TRUE], [0.4, 0.9], [TRUE])])
    assert found.scores.tolist() == [0.9, 0.4] and found.hits.tolist() == [True, False]


def test_weights_are_repetitions():
    samples = [sample([TRUE], [0.9], [TRUE], "a"), sample([WRONG], [0.95], [TRUE], "b")]
    thrice = [samples[0]] * 3 + [samples[1]]
    assert average_precision(scored_boxes(samples), np.array([3, 1])) == pytest.approx(
        average_precision(scored_boxes(thrice))
    )


def test_where_every_box_is_right_the_interval_is_not_a_point():
    box = [0.0, 0.0, 10.0, 10.0]
    rows = [{"boxes": [box], "box_scores": [0.9], "true_boxes": [box], "image_id": image} for image in range(4)]
    figures, intervals, _ = confidence_figures(rows)
    assert figures["ap50"] == 1.0 and intervals["ap50"] == [pytest.approx(0.5101, abs=1e-4), 1.0]  # Wilson, 4 of 4


def test_without_scores_there_are_no_figures():
    assert confidence_figures([sample([TRUE], None, [TRUE])]) == ({}, {}, [])


def test_sure_and_right_half_of_the_time():
    samples = [sample([TRUE if i % 2 else WRONG], [0.5 + 0.3 * (i >= 50)], [TRUE], i) for i in range(100)]
    bins = reliability(scored_boxes(samples))
    assert sum(part["n"] for part in bins) == 100 and len(bins) == 10
    assert [part["score"] for part in bins] == pytest.approx([0.5] * 5 + [0.8] * 5)
    assert all(part["share_right"] == pytest.approx(0.5) for part in bins)
    assert expected_calibration_error(bins) == pytest.approx(0.15)
    figures, intervals, again = confidence_figures(samples)
    assert again == bins and intervals["ap50"][0] < figures["ap50"] < intervals["ap50"][1]


def test_the_plot_is_drawn(tmp_path):
    bins = [{"score": 0.2, "share_right": 0.1, "n": 5}, {"score": 0.9, "share_right": 0.8, "n": 5}]
    picture = np.asarray(Image.open(plot_calibration({"grounding": bins}, tmp_path / "c.png")).convert("RGB")).astype(
        int
    )
    blue = (picture[..., 2] > 150) & (picture[..., 0] < 80)
    rows, columns = np.nonzero(blue)
    # A line from the lower left to the upper right; what lies at the upper left is the legend.
    assert columns.max() - columns[rows.argmax()] > 250 and rows.max() - rows[columns.argmax()] > 150
