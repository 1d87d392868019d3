import json

import pytest
import yaml

pytest.importorskip(
    "datasets", exc_type=ImportError, reason="lmms-eval is not installed (pip install 'regiontower[eval]')"
)
pytest.importorskip(
    "lmms_eval", exc_type=ImportError, reason="lmms-eval is not installed (pip install 'regiontower[eval]')"
)

from datasets import load_from_disk

from regiontower.eval.task_folder import task_folder
from regiontower.vision_towers.errors import UserError


def test_the_folder_lies_in_the_cache_and_is_made_once(records_path, isolated_cache):
    folder = task_folder(records_path)
    assert folder.parent == isolated_cache / "regiontower" / "tasks"
    assert sorted(path.name for path in folder.glob("*.yaml")) == [
        "regiontower_absent.yaml",
        "regiontower_grounding.yaml",
        "regiontower_reading.yaml",
        "regiontower_referring.yaml",
    ]
    stamp = (folder / "regiontower_reading.yaml").stat().st_mtime_ns
    assert task_folder(records_path) == folder
    assert (folder / "regiontower_reading.yaml").stat().st_mtime_ns == stamp
    assert task_folder(records_path, limit=3) != folder
    assert len(list(folder.parent.iterdir())) == 2  # no drafts are left


def test_another_file_content_gets_another_folder(records_path, isolated_cache):
    folder = task_folder(records_path)
    records_path.write_text(records_path.read_text().replace("the left one", "the first one"))
    assert task_folder(records_path) != folder


def test_rows_keep_their_types(tmp_path, make_records, isolated_cache):
    path = make_records(tmp_path / "data", images=3)
    path.write_text(path.read_text().replace("Hello World", "2018-04-16"))
    folder = task_folder(path)
    bound = yaml.safe_load((folder / "regiontower_reading.yaml").read_text())
    rows = load_from_disk(bound["dataset_path"])["test"]
    assert rows[0]["answers"] == ["2018-04-16"]
    assert rows[0]["prompt_boxes"] == [[60.0, 20.0, 90.0, 70.0]]
    grounding = load_from_disk(str(folder / "regiontower_grounding"))["test"]
    assert grounding[0]["answers"] == [] and grounding[0]["prompt_boxes"] == []
    assert grounding[0]["image"] == str(tmp_path / "data/my pictures/photo 0.png")


def test_a_task_without_rows_is_left_out(tmp_path, make_records, isolated_cache):
    folder = task_folder(make_records(tmp_path / "data", with_ocr=False))
    assert not (folder / "regiontower_reading.yaml").exists()
    empty = tmp_path / "data" / "empty.jsonl"
    picture = {"image": "my pictures/photo 0.png", "width": 100, "height": 80}
    empty.write_text(json.dumps(picture) + "\n")
    with pytest.raises(UserError, match="no row for"):
        task_folder(empty)


def test_without_data_evaluation_scenes_are_bound(isolated_cache, monkeypatch):
    import regiontower.eval.task_folder as module

    scenes = module.evaluation_scenes(count=2)
    assert len(scenes.read_text().splitlines()) == 2
    assert module.evaluation_scenes(count=2) == scenes
    monkeypatch.setattr(module, "evaluation_scenes", lambda: scenes)
    assert (task_folder() / "regiontower_grounding.yaml").is_file()
