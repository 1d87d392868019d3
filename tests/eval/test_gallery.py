"""Which answers a report shows, and what is drawn on them."""

import base64
import io

import numpy as np
import pytest
from PIL import Image

from regiontower.eval.gallery import chosen_rows, gallery
from regiontower.train_stages.masks import encode_mask


def test_best_worst_and_random():
    rows = [{"iou": (number * 37 % 100) / 100, "position": number} for number in range(100)]
    groups = chosen_rows(rows, 12)
    assert [row["iou"] for row in groups["best"]] == [0.99, 0.98, 0.97, 0.96]
    assert [row["iou"] for row in groups["worst"]] == [0.0, 0.01, 0.02, 0.03]
    assert len(groups["random"]) == 4
    shown = [row["position"] for found in groups.values() for row in found]
    assert len(shown) == len(set(shown)) == 12
    assert chosen_rows(rows, 12) == groups  # the same ones every time
    assert chosen_rows(rows[:5], 12) == {"all": rows[:5]}


def test_answers_of_one_score_are_not_the_first_of_the_file():
    rows = [{"correct": True, "position": number} for number in range(90)]
    best = [row["position"] for row in chosen_rows(rows, 30)["best"]]
    assert max(best) > 60 and min(best) < 30
    many = [{"correct": True, "position": number} for number in range(1000)]
    positions = [row["position"] for row in chosen_rows(many, 90)["random"]]
    assert positions == sorted(positions) and min(positions) < 150 and max(positions) > 850


@pytest.fixture
def image(tmp_path):
    Image.new("RGB", (200, 100), (30, 30, 30)).save(tmp_path / "a.png")
    return str(tmp_path / "a.png")


def drawn(task, row):
    """Columns of green, pink and red pixels of the only picture, as (first, last)."""
    (group,) = gallery(task, [row], 9)["groups"]
    data = base64.b64decode(group["pictures"][0]["source"].partition("base64,")[2])
    pixels = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
    red, green, blue = pixels[..., 0], pixels[..., 1], pixels[..., 2]
    found = {}
    masks = {"green": (green > 150) & (red < 120), "pink": (red > 150) & (blue > 150), "red": (red > 120) & (blue < 90)}
    for name, mask in masks.items():
        columns = np.flatnonzero(mask.any(axis=0))
        found[name] = (int(columns.min()), int(columns.max())) if len(columns) else None
    return found


def common(image, **fields):
    return {"image": image, "question": "?", "answer": "x", "correct": False, "prompt_boxes": [], **fields}


def test_all_boxes_of_several_are_drawn(image):
    row = common(image, target=[[10, 10, 40, 40], [120, 10, 150, 40]], predicted_boxes=[[60, 60, 90, 90]])
    found = drawn("regiontower_several", row | {"found": 0, "true": 2, "predicted": 1, "f1": 0.0})
    assert found["green"] == pytest.approx((10, 149), abs=2) and found["pink"] == pytest.approx((60, 89), abs=2)


def test_points_and_shapes_are_drawn(image):
    asked = common(image, target=["cup"], prompt_boxes=[[97.5, 47.5, 102.5, 52.5]], point_xy=[100, 50])
    low, high = drawn("regiontower_classify_point", asked)["red"]
    assert (low + high + 1) / 2 == pytest.approx(100, abs=2) and high - low < 12
    mask = np.zeros((100, 200), dtype=bool)
    mask[20:60, 140:180] = True
    asked = common(image, target=["cup"], prompt_boxes=[[140, 20, 180, 60]], shape=encode_mask(mask)["counts"])
    assert drawn("regiontower_classify_shape", asked)["red"] == pytest.approx((140, 179), abs=2)
    asked = common(image, target=["cup"], prompt_boxes=[[20, 20, 60, 60]])
    assert drawn("regiontower_classify_box", asked)["green"] == pytest.approx((20, 59), abs=2)
