import json

import numpy as np
import pytest
from PIL import Image

from regiontower.eval.more_rows import CLASSIFY_CHOICE
from regiontower.eval.task_kinds import MORE_TASKS, RECORD_TASKS
from regiontower.eval.task_rows import UNKNOWN, task_rows
from regiontower.train_stages.masks import decode_mask, encode_mask
from regiontower.train_stages.record_io import read_records


def ring(height=80, width=100):
    """A mask whose middle is not in it."""
    mask = np.zeros((height, width), dtype=bool)
    mask[10:50, 10:50] = True
    mask[20:40, 20:40] = False
    return mask


@pytest.fixture
def records(tmp_path):
    Image.new("RGB", (100, 80)).save(tmp_path / "a.png")
    Image.new("RGB", (100, 80)).save(tmp_path / "b.png")
    crowd = {"box_xyxy": [0, 0, 100, 10], "category": "person", "stuff": True, "texts": ["people", "a person"]}
    first = {
        "image": "a.png",
        "width": 100,
        "height": 80,
        "regions": [
            {"box_xyxy": [10, 10, 50, 50], "category": "cup", "mask": encode_mask(ring()), "texts": ["cup", "big cup"]},
            {"box_xyxy": [22, 22, 38, 38], "category": "cup", "texts": ["cup"], "captions": ["a small cup", "a mug"]},
            {
                "box_xyxy": [60, 20, 90, 70],
                "category": "sign",
                "texts": ['sign "EXIT"', 'green sign "EXIT"'],
                "ocr": "EXIT",
            },
            {"box_xyxy": [60, 70, 90, 80], "ocr": "12.50"},
            {"box_xyxy": [0, 60, 20, 80], "category": "person", "texts": ["a person"]},
            crowd,
        ],
    }
    second = {"image": "b.png", "width": 100, "height": 80, "regions": []}
    for y in (0, 20):  # the same transcript twice, the same category twice
        second["regions"].append({"box_xyxy": [0, y, 30, y + 10], "category": "sign", "ocr": "EXIT"})
    path = tmp_path / "records.jsonl"
    path.write_text("\n".join(map(json.dumps, (first, second))))
    return read_records(path)


def of(records, task):
    return task_rows(records, [task])[f"regiontower_{task}"]


def test_several_asks_for_all_of_a_phrase_at_once(records):
    (row,) = of(records, "several")  # "a person" is also true of a crowd, which is no one box
    assert row.phrase == "cup" and row.question == "Where is cup?"
    assert row.targets == [[10, 10, 50, 50], [22, 22, 38, 38]]
    assert row.target_xyxy == [] and row.prompt_boxes == []


def test_counting_leaves_out_what_also_comes_as_a_crowd(records):
    assert [(row.image_id, row.phrase, len(row.targets)) for row in of(records, "counting")] == [
        ("a.png", "cup", 2),
        ("a.png", "sign", 1),
        ("b.png", "sign", 2),
    ]


def test_text_grounding_asks_for_a_transcript_that_stands_once(records):
    rows = of(records, "text_grounding")
    assert [(row.phrase, row.target_xyxy) for row in rows] == [
        ('sign "EXIT"', [60, 20, 90, 70]),  # the record's own shortest phrase that quotes it
        ('the text "12.50"', [60, 70, 90, 80]),
    ]


def test_captioning_accepts_all_captions_of_a_region(records):
    (row,) = of(records, "captioning")
    assert row.answers == ["a small cup", "a mug"] and row.prompt_boxes == [[22, 22, 38, 38]]


def test_classification_offers_the_nearest_other_thing(records):
    rows = of(records, "classify_box")
    assert [row.choices for row in rows] == [
        ["cup", "person"],  # whose middle is nearer than the sign's
        ["cup", "person"],
        ["sign", "cup"],
        ["person", "cup"],
        ["sign", rows[4].choices[1]],  # alone with its like: another image's category
        ["sign", rows[5].choices[1]],
    ]
    assert {row.choices[1] for row in rows[4:]} <= {"cup", "person"}
    assert rows[0].question == CLASSIFY_CHOICE.format(first="cup", second="person")
    assert rows[1].question == CLASSIFY_CHOICE.format(first="person", second="cup")  # the true one in turn
    assert [row.distractors for row in rows] == [1, 1, 0, 1, 1, 1]
    assert all(row.prompt_boxes == [row.target_xyxy] for row in rows)


def test_a_point_lies_on_the_object_alone(records):
    (row,) = of(records, "classify_point")  # only one region has a mask
    x, y = row.point_xy
    assert ring()[int(y), int(x)]
    assert not (22 <= x <= 38 and 22 <= y <= 38)
    ((x0, y0, x1, y1),) = row.prompt_boxes
    assert (x0 + x1) / 2 == pytest.approx(x) and x1 - x0 == y1 - y0 == 5
    assert row.target_xyxy == [10, 10, 50, 50]


def test_a_shape_lies_inside_the_object(records):
    (row,) = of(records, "classify_shape")
    stroke = decode_mask((80, 100), row.shape)
    assert stroke.any() and not (stroke & ~ring()).any() and stroke.sum() < ring().sum()
    rows, columns = np.nonzero(stroke)
    assert row.prompt_boxes == [[columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]]
    assert of(records, "classify_shape") == [row]  # the same one every time


def test_without_a_category_nobody_knows_the_distractors(records):
    assert of(records, "text_grounding")[1].distractors == UNKNOWN


def test_the_four_are_asked_when_nothing_is_said(records):
    assert not set(task_rows(records)) & set(MORE_TASKS)
    assert set(task_rows(records, RECORD_TASKS)) == set(RECORD_TASKS)


def test_scenes_have_rows_for_every_task(tmp_path):
    from regiontower.train_stages.scenes import EVAL_SEED_START, write_scenes

    rows = task_rows(read_records(write_scenes(tmp_path, 6, EVAL_SEED_START)), RECORD_TASKS)
    assert all(rows.values()), {name: len(found) for name, found in rows.items()}
    grounded = {(row.image_id, row.phrase) for row in rows["regiontower_grounding"]}
    # Text is asked for in words that the scenes' own phrases use.
    assert {(row.image_id, row.phrase) for row in rows["regiontower_text_grounding"]} <= grounded
