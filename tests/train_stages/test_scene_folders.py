"""Scenes of one seed are the same in any process, and folders of them on disk."""

import hashlib
import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from regiontower.train_stages.record_io import read_records
from regiontower.train_stages.scenes import EVAL_SEED_START, generate_scene, write_scenes
from regiontower.vision_towers.errors import UserError

FINGERPRINT = """
import hashlib
from regiontower.train_stages.scenes import generate_scene
digest = hashlib.sha256()
for seed in (7, 3, 1_000_004):
    scene = generate_scene(seed)
    digest.update(scene.image.tobytes() + scene.record.model_dump_json().encode())
print(digest.hexdigest())
"""


def test_same_bytes_in_another_process_without_torch():
    digest = hashlib.sha256()
    for seed in (7, 3, 1_000_004):
        scene = generate_scene(seed)
        digest.update(scene.image.tobytes() + scene.record.model_dump_json().encode())
    code = FINGERPRINT + "import sys; assert 'torch' not in sys.modules"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == digest.hexdigest()


def test_split_follows_the_seed():
    assert generate_scene(EVAL_SEED_START - 1).record.split == "train"
    assert generate_scene(EVAL_SEED_START).record.split == "eval"


def folder_bytes(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_written_scenes_are_the_generated_ones_for_any_number_of_processes(tmp_path):
    one = write_scenes(tmp_path / "one", 7, 90, progress=False, workers=1)
    two = write_scenes(tmp_path / "two", 7, 90, progress=False, workers=2)
    assert one == tmp_path / "one" / "records.jsonl"
    assert folder_bytes(one.parent) == folder_bytes(two.parent)
    assert {path.name for path in one.parent.iterdir()} == {"images", "records.jsonl", "scenes.json"}
    found = read_records(one, check_images=True)
    assert len(found.records) == 7 and not found.bad
    for i, record in enumerate(found.records):
        assert record == generate_scene(90 + i).record
        with Image.open(found.image_path(record)) as image:
            expected = generate_scene(90 + i).image
            difference = np.abs(np.asarray(image).astype(int) - np.asarray(expected))
            assert image.size == expected.size and difference.mean() < 5


def test_interrupted_folder_is_continued(tmp_path, monkeypatch):
    whole = write_scenes(tmp_path / "whole", 6, 40, progress=False)
    from regiontower.train_stages.scenes import write

    made = []

    def counted(seed, *args):
        if len(made) == 4:
            raise KeyboardInterrupt
        made.append(seed)
        return generate_scene(seed, *args)

    monkeypatch.setattr(write, "generate_scene", counted)
    with pytest.raises(KeyboardInterrupt):
        write_scenes(tmp_path / "parts", 6, 40, progress=False)
    assert not (tmp_path / "parts" / "records.jsonl").exists()
    with (tmp_path / "parts" / "records.jsonl.part").open("a") as file:
        file.write('{"image":"images/0000044.jpg","wid')  # what a crash leaves
    (tmp_path / "parts" / "images" / "0000043.jpg").unlink()
    made.clear()
    again = write_scenes(tmp_path / "parts", 6, 40, progress=False)
    assert made == [43, 44, 45]
    assert folder_bytes(again.parent) == folder_bytes(whole.parent)
    made.clear()
    longer = write_scenes(tmp_path / "parts", 7, 40, progress=False)
    assert made == [46] and len(longer.read_text().splitlines()) == 7


def test_users_mistakes_are_one_sentence(tmp_path):
    cases = [
        (dict(count=2, seed=EVAL_SEED_START - 1), r"cross 1000000.*--seed 999998 or lower"),
        (dict(count=0, seed=1), "at least 1"),
        (dict(count=1, seed=-1), "at least 0"),
        (dict(count=1, seed=1, preset="hard"), "default, easy, single"),
        (dict(count=1, seed=1, words="all"), "seen, unseen"),
    ]
    for arguments, message in cases:
        with pytest.raises(UserError, match=message):
            write_scenes(tmp_path / "bad", progress=False, **arguments)
    assert not (tmp_path / "bad").exists()
    write_scenes(tmp_path / "edge", 1, EVAL_SEED_START - 1, preset="single", progress=False)
    with pytest.raises(UserError, match="other settings"):
        write_scenes(tmp_path / "edge", 1, EVAL_SEED_START - 1, preset="easy", progress=False)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "records.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match="not scenes"):
        write_scenes(tmp_path / "mine", 1, 1, progress=False)
    with pytest.raises(UserError, match="is a file"):
        write_scenes(tmp_path / "mine" / "records.jsonl", 1, 1, progress=False)
    with pytest.raises(UserError, match="seed"):
        generate_scene(-1)


def test_progress_goes_to_stderr(tmp_path, capsys):
    write_scenes(tmp_path / "out", 2, 1, preset="single")
    captured = capsys.readouterr()
    assert captured.out == "" and "2/2" in captured.err


def test_settings_are_noted_beside_the_records(tmp_path):
    write_scenes(tmp_path, 1, 12, preset="single", words="unseen", progress=False)
    noted = json.loads((tmp_path / "scenes.json").read_text())
    assert noted["seed"] == 12 and noted["words"] == "unseen" and noted["preset"]["name"] == "single"
