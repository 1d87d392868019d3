"""What stands in a run directory, and what a run may do to it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from small_runs import assert_equal_weights, signal_at, small_run, weights

from regiontower.mllm.adapters import CONFIG_FILE
from regiontower.train_stages.atomic_write import write_atomically
from regiontower.train_stages.engine import StageInterrupted
from regiontower.train_stages.engine.run_dir import RECIPE_FILE, checkpoints
from regiontower.train_stages.engine.run_log import LOG_FILE, LogRow, read_rows
from regiontower.vision_towers.errors import UserError

OVERWRITE = {"overwrite": True}


def steps_of(run_dir: Path) -> list[int]:
    return [row.step for row in read_rows(run_dir / LOG_FILE, LogRow)]


# ---- --overwrite ----


def test_the_same_command_with_overwrite_goes_on_with_what_was_stopped(tmp_path, capsys):
    """As a job does that its scheduler stops and starts again, time after time."""
    small_run(tmp_path / "straight")
    for step in (2, 3, 5):
        with pytest.raises(StageInterrupted):
            small_run(tmp_path / "run", callbacks=[signal_at(step)], options=OVERWRITE)
        assert checkpoints(tmp_path / "run")[-1].name == f"step_{step}"
    capsys.readouterr()
    small_run(tmp_path / "run", options=OVERWRITE)
    said = capsys.readouterr().err
    assert "this very run was not finished, so it goes on" in said and "resuming from step 5" in said
    assert_equal_weights(tmp_path / "straight", tmp_path / "run")


def test_overwrite_begins_a_finished_run_again_and_removes_an_unfinished_other_one(tmp_path):
    small_run(tmp_path / "run")
    with pytest.raises(StageInterrupted):
        small_run(tmp_path / "run", callbacks=[signal_at(3)], options=OVERWRITE)
    small_run(tmp_path / "run", steps=4, options=OVERWRITE)
    assert steps_of(tmp_path / "run") == [1, 2, 3, 4]


@pytest.mark.parametrize("recipe", [None, "", "train: 5", "- train", "train: {steps: ["])
def test_overwrite_asks_nothing_of_the_recipe_that_it_removes(tmp_path, recipe):
    """An earlier --overwrite may have been killed half way through."""
    with pytest.raises(StageInterrupted):
        small_run(tmp_path / "run", callbacks=[signal_at(3)])
    path = tmp_path / "run" / RECIPE_FILE
    path.unlink() if recipe is None else path.write_text(recipe)
    with pytest.raises(UserError) as caught:
        small_run(tmp_path / "run")
    assert "\n" not in str(caught.value)
    small_run(tmp_path / "run", options=OVERWRITE)
    assert steps_of(tmp_path / "run") == [1, 2, 3, 4, 5, 6]


# ---- parents ----


@pytest.mark.parametrize("place", [".", "older/align", "../link"])
def test_a_run_is_not_written_where_its_parent_lies(tmp_path, place):
    run_dir = tmp_path / "run"
    small_run(run_dir)
    (tmp_path / "link").symlink_to(run_dir)
    parent = run_dir / place
    if not parent.exists():
        small_run(parent)
    before = weights(parent)
    with pytest.raises(
        UserError, match=r"no run can be written where its own mllm lies .*; choose another directory\.$"
    ):
        small_run(run_dir, steps=3, options={**OVERWRITE, "parents": {"mllm": parent}})
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(parent).items())
    small_run(tmp_path / "other", options={"parents": {"mllm": parent}})
    small_run(run_dir / "beside", options={"parents": {"mllm": run_dir}})  # in a folder of its own it does no harm


def test_nor_where_the_base_of_its_parent_lies(tmp_path):
    """A chain: an adapter of an adapter of the run that would be removed."""
    small_run(tmp_path / "run")
    for name, base in (("first", "run"), ("second", "first")):
        small_run(tmp_path / name)
        (tmp_path / name / CONFIG_FILE).write_text(json.dumps({"base_model_name_or_path": str(tmp_path / base)}))
    parents = {"mllm": tmp_path / "second"}
    for wanted in ("run", "first"):
        with pytest.raises(UserError, match="no run can be written where its own mllm's base lies"):
            small_run(tmp_path / wanted, steps=3, options={**OVERWRITE, "parents": parents})
        assert weights(tmp_path / wanted)


# ---- stage.json ----


@pytest.mark.parametrize(
    ("content", "wrong"),
    [
        ("{}", r"not a run's record \(stage: Field required\)"),
        ("[]", "not a run's record, which is a JSON object"),
        ("{", "not valid JSON"),
        (b"\xff\xfe\x00", "not valid JSON"),
    ],
)
def test_a_broken_record_of_a_run_is_one_sentence(tmp_path, content, wrong):
    small_run(tmp_path / "run")
    (tmp_path / "run" / "stage.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    for options in ({}, OVERWRITE):
        with pytest.raises(UserError, match=wrong) as caught:
            small_run(tmp_path / "run", options=options)
        assert "\n" not in str(caught.value) and "delete it to start the run again" in str(caught.value)


# ---- a power cut ----


@pytest.fixture
def disk(monkeypatch):
    """In order: ("sync", inode) of everything that was brought to the disk, ("name", path, inode) of new names."""
    events = []
    sync, replace = os.fsync, os.replace

    def noted_sync(handle):
        sync(handle)
        events.append(("sync", os.fstat(handle).st_ino))

    def noted_replace(source, target):
        replace(source, target)
        events.append(("name", Path(target), Path(target).stat().st_ino))

    monkeypatch.setattr(os, "fsync", noted_sync)
    monkeypatch.setattr(os, "replace", noted_replace)
    return events


@pytest.mark.skipif(os.name == "nt", reason="folders are not synced there")
def test_a_model_is_on_the_disk_before_its_run_is_called_finished(tmp_path, disk):
    small_run(tmp_path / "run")
    run_dir = tmp_path / "run"
    names = [(number, *event[1:]) for number, event in enumerate(disk) if event[0] == "name"]
    (model,) = [each for each in names if each[1] == run_dir / "model.safetensors"]
    finished = [each for each in names if each[1] == run_dir / "stage.json"][-1]
    assert ("sync", model[2]) in disk[: model[0]]  # its bytes before its name
    assert ("sync", run_dir.stat().st_ino) in disk[model[0] : finished[0]]  # its name before the word
    assert ("sync", finished[2]) in disk[: finished[0]] and disk[-1] == ("sync", run_dir.stat().st_ino)
    (checkpoint,) = [each for each in names if each[1].name == "step_6"]
    for path in (run_dir / "checkpoints" / "step_6").iterdir():
        assert ("sync", path.stat().st_ino) in disk[: checkpoint[0]]
    assert ("sync", (run_dir / "checkpoints").stat().st_ino) in disk[checkpoint[0] :]


@pytest.mark.skipif(os.name == "nt", reason="folders are not synced there")
def test_a_text_is_on_the_disk_before_its_name_and_its_name_before_all_else(tmp_path, disk):
    write_atomically(tmp_path / "text", "words\n")
    inode = (tmp_path / "text").stat().st_ino
    assert disk == [("sync", inode), ("name", tmp_path / "text", inode), ("sync", tmp_path.stat().st_ino)]
    assert (tmp_path / "text").read_text() == "words\n" and [path.name for path in tmp_path.iterdir()] == ["text"]
