import json
from collections import Counter
from pathlib import Path

import pytest

from regiontower.eval.task_rows import TASKS, even_sample, is_grounding_row, is_task_row, task_rows
from regiontower.train_stages.record_io import read_records
from regiontower.vision_towers.errors import UserError


@pytest.fixture
def records(records_path):
    return read_records(records_path, check_images=True)


def test_grounding_has_one_row_for_each_phrase_of_one_region(records):
    rows = task_rows(records)["regiontower_grounding"]
    assert [row.question for row in rows[:3]] == [
        "Where is the red box?",
        "Where is the left one?",
        "Where is the blue box?",
    ]
    assert len(rows) == 12  # "a thing" stands at both regions of every image
    assert rows[2].target_xyxy == [60.0, 20.0, 90.0, 70.0]
    assert rows[2].phrase == "the blue box"
    assert all(row.prompt_boxes == [] and row.answers == [] for row in rows)


def test_referring_accepts_every_phrase_of_the_box_alone(records):
    rows = task_rows(records)["regiontower_referring"]
    assert len(rows) == 8
    assert rows[0].answers == ["the red box", "the left one"]
    assert rows[1].answers == ["the blue box"]
    assert all(row.question == "What is in <region>?" and row.prompt_boxes == [row.target_xyxy] for row in rows)


def test_reading_has_one_row_for_each_transcript(records):
    rows = task_rows(records)["regiontower_reading"]
    assert [(row.image_id, row.region_index, row.answers) for row in rows] == [
        (f"my pictures/photo {number}.png", 1, ["Hello World"]) for number in range(3)
    ]
    assert all(row.question == "Read <region>." and row.prompt_boxes == [row.target_xyxy] for row in rows)


def test_absent_has_one_row_for_each_phrase_that_nothing_fits(records):
    rows = task_rows(records)["regiontower_absent"]
    assert [(row.question, row.phrase, row.region_index) for row in rows] == [("Where is a cow?", "a cow", -1)] * 4
    assert all(row.target_xyxy == [] and row.prompt_boxes == [] and row.answers == [] for row in rows)
    assert is_grounding_row(vars(rows[0]))  # its answer is read as boxes


def test_rows_name_existing_files_and_their_size(records):
    for rows in task_rows(records).values():
        for row in rows:
            assert Path(row.image).is_absolute() and Path(row.image).is_file()
            assert (row.width, row.height) == (100, 80)


def test_only_the_asked_tasks(records):
    assert list(task_rows(records, tasks=["regiontower_reading"])) == ["regiontower_reading"]
    assert list(task_rows(records)) == list(TASKS)
    with pytest.raises(UserError, match=", ".join(TASKS)):
        task_rows(records, tasks=["refcoco"])


def test_region_without_text_or_transcript_gives_no_row(tmp_path, records):
    record = {"image": "x.png", "width": 10, "height": 10, "regions": [{"box_xyxy": [0, 0, 5, 5], "category": "cup"}]}
    (tmp_path / "r.jsonl").write_text(json.dumps(record) + "\n")
    assert not any(task_rows(read_records(tmp_path / "r.jsonl")).values())


def test_a_limit_is_spread_over_the_images(records):
    rows = task_rows(records)["regiontower_grounding"]
    for limit in range(1, 13):
        chosen = even_sample(rows, limit)
        counts = Counter(row.image_id for row in chosen)
        assert len(chosen) == limit
        assert max(counts.values()) - (min(counts.values()) if len(counts) == 4 else 0) <= 1
        positions = [rows.index(row) for row in chosen]
        assert positions == sorted(positions)
        assert chosen == even_sample(rows, limit)
    assert even_sample(rows, 99) == rows
    assert task_rows(records, limit=4)["regiontower_grounding"] == even_sample(rows, 4)
    # Not the first ones: over a few seeds every image comes up.
    assert {even_sample(rows, 1, seed=seed)[0].image_id for seed in range(30)} == {row.image_id for row in rows}
    with pytest.raises(UserError, match="at least 1"):
        even_sample(rows, 0)


def test_rows_are_told_from_foreign_documents(records):
    rows = task_rows(records)
    assert is_grounding_row(vars(rows["regiontower_grounding"][0]))
    assert not is_grounding_row(vars(rows["regiontower_reading"][0]))
    assert is_task_row(vars(rows["regiontower_reading"][0]))
    assert not is_task_row({"image": "x", "question": "?"})
