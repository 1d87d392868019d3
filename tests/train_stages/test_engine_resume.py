"""Whole runs on a toy model that stop and go on: the same to the bit as those that never stopped."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from small_runs import signal_at
from toy_stage import TRAIN, NoisyRows, ToyModel, assert_same_run, run, stage_of
from transformers import TrainerCallback

from regiontower.train_stages.engine import (
    StageInterrupted,
    StreamedDataset,
)
from regiontower.train_stages.engine.run_log import LOG_FILE, LogRow, read_rows
from regiontower.train_stages.recipe import TrainConfig
from regiontower.vision_towers.errors import UserError


@pytest.mark.parametrize(
    ("stop_at", "grad_accum"),
    [(4, 1), (6, 1), (7, 1), (4, 2)],  # 6 batches an epoch: inside the first, at its end, inside the second
)
def test_resume_equals_the_straight_run_to_the_bit(tmp_path, stop_at, grad_accum):
    train = TrainConfig(**(TRAIN.__dict__ | {"grad_accum": grad_accum, "save_steps": 100}))
    run(tmp_path / "straight", train)
    with pytest.raises(StageInterrupted, match=f"align stopped at step {stop_at}"):
        run(tmp_path / "resumed", train, callbacks=[signal_at(stop_at)])
    stage = stage_of(tmp_path / "resumed")
    assert stage["status"] == "interrupted" and stage["steps"] == stop_at
    assert not (tmp_path / "resumed" / "model.safetensors").exists()
    torch.manual_seed(99)  # nothing may depend on the process that goes on
    result = run(tmp_path / "resumed", train, model=ToyModel(seed=7))
    assert result.steps == 8
    assert_same_run(tmp_path / "straight", tmp_path / "resumed")


def test_resume_after_a_crash_takes_the_lost_steps_again(tmp_path):
    class Crash(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 5:
                raise RuntimeError("power cut")

    run(tmp_path / "straight")
    with pytest.raises(RuntimeError, match="power cut"):
        run(tmp_path / "crashed", callbacks=[Crash()])
    assert [row.step for row in read_rows(tmp_path / "crashed" / LOG_FILE, LogRow)] == [1, 2, 3, 4, 5]
    (tmp_path / "crashed" / "checkpoints" / "checkpoint-5").mkdir()  # one it was in the middle of writing
    with (tmp_path / "crashed" / "log.jsonl").open("a") as log:
        log.write('{"step": 6, "lo')
    assert stage_of(tmp_path / "crashed")["status"] == "running"
    run(tmp_path / "crashed", model=ToyModel(seed=7))
    assert_same_run(tmp_path / "straight", tmp_path / "crashed")
    assert [path.name for path in (tmp_path / "crashed" / "checkpoints").iterdir()].count("checkpoint-5") == 0


def test_a_crash_while_saving_the_model_costs_no_training(tmp_path):
    def disk_full(folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        run(tmp_path / "run", save=disk_full)
    assert not (tmp_path / "run" / "model.safetensors").exists()
    steps = []

    class Count(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            steps.append(state.global_step)

    run(tmp_path / "run", model=ToyModel(seed=7), callbacks=[Count()])
    run(tmp_path / "straight")
    assert not steps
    assert_same_run(tmp_path / "straight", tmp_path / "run")


class Counted(StreamedDataset):
    """Rows of `NoisyRows` without end; what was read and made is noted."""

    def __init__(self, bad=()):
        self.rows, self.bad, self.read, self.made = NoisyRows(), set(bad), [], []

    def examples(self, rank, processes):
        for number in itertools.count(rank, processes):
            self.read.append(number)
            yield number

    def item(self, example):
        self.made.append(example)
        return None if example in self.bad else self.rows[example % len(self.rows)]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_resumes_where_it_was_whatever_reads_it(tmp_path, workers):
    whole = run(tmp_path / "whole", TrainConfig(steps=6, batch_size=4, log_steps=1), dataset=Counted())
    train = TrainConfig(steps=6, batch_size=4, log_steps=1, workers=workers)
    with pytest.raises(StageInterrupted):
        run(tmp_path / "cut", train, dataset=Counted(), callbacks=[signal_at(4)])
    stream = Counted()
    again = run(tmp_path / "cut", train, dataset=stream)
    assert whole.steps == again.steps == 6
    assert_same_run(tmp_path / "whole", tmp_path / "cut")
    if not workers:
        assert min(stream.made) == 16 and min(stream.read) == 0  # what had been learned from is passed over unmade


def test_what_a_stream_cannot_read_is_replaced_and_a_whole_batch_of_it_ends_the_run(tmp_path):
    assert run(tmp_path / "run", dataset=Counted(bad=[2, 5])).steps == 8
    with pytest.raises(UserError, match="No image of a whole batch"):
        run(tmp_path / "other", dataset=Counted(bad=range(4, 8)))
    with pytest.raises(UserError, match=r"train\.epochs needs a dataset with a length"):
        run(tmp_path / "third", TrainConfig(epochs=1), dataset=Counted())
