import json

import pytest

from regiontower.eval.baselines import trivial_baselines


def test_trivial_answers_have_known_figures(records_path):
    found = trivial_baselines(records_path)
    grounding = found["regiontower_grounding"]
    # Red covers 1200 px, blue 1500 px, the image 8000 px; 8 rows ask for red, 4 for blue.
    assert grounding["whole_image"]["miou"] == pytest.approx((8 * 1200 / 8000 + 4 * 1500 / 8000) / 12)
    assert grounding["whole_image"]["acc50"] == 0.0
    assert grounding["largest_box"]["acc50"] == pytest.approx(4 / 12)
    assert grounding["largest_box"]["miou"] == pytest.approx(4 / 12)
    assert grounding["largest_box"]["parse_rate"] == 1.0
    assert found["regiontower_referring"]["majority_phrase"]["answer"] == "the red box"
    assert found["regiontower_referring"]["majority_phrase"]["em"] == 0.5
    assert found["regiontower_reading"]["majority_text"]["em"] == 1.0
    assert found["regiontower_reading"]["majority_text"]["n"] == 3


def test_the_majority_is_counted_over_the_training_file(records_path, tmp_path):
    regions = [{"box_xyxy": [0, 0, 5, 5], "texts": ["The BLUE box"], "ocr": "bye"}]
    train = tmp_path / "train.jsonl"
    train.write_text(json.dumps({"image": "x.png", "width": 10, "height": 10, "regions": regions}) + "\n")
    found = trivial_baselines(records_path, train=train)
    assert found["regiontower_referring"]["majority_phrase"]["answer"] == "the blue box"
    assert found["regiontower_referring"]["majority_phrase"]["em"] == 0.5
    assert found["regiontower_reading"]["majority_text"]["em"] == 0.0


def test_the_rows_are_those_of_the_evaluation(records_path):
    found = trivial_baselines(records_path, tasks=["regiontower_grounding"], limit=5)
    assert list(found) == ["regiontower_grounding"]
    assert found["regiontower_grounding"]["whole_image"]["n"] == 5
