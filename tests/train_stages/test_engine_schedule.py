"""Clock, learning rates, progress lines, data order: the parts of a run that can be looked at one by one."""

from __future__ import annotations

import io
import random

import numpy as np
import pytest
import torch
from rich.console import Console

from regiontower.train_stages.engine import progress as progress_module
from regiontower.train_stages.engine.progress import ProgressReport, duration
from regiontower.train_stages.engine.run_log import LogRow
from regiontower.train_stages.engine.schedule import Clock, lr_factor, lr_lambda, plan_steps
from regiontower.train_stages.engine.seeded_data import EpochSampler, SeededCollate, SeededDataset
from regiontower.train_stages.recipe import TrainConfig
from regiontower.vision_towers.errors import UserError


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("steps", [1, 2, 7, 100])
def test_no_step_of_a_run_has_learning_rate_zero(schedule, steps):
    train = TrainConfig(steps=steps, schedule=schedule, warmup=0.2)
    factor = lr_lambda(train, Clock(steps, None))
    factors = [factor(step) for step in range(steps)]
    assert all(0 < value <= 1 for value in factors)
    if schedule != "constant" and steps == 100:
        assert factors[-1] < 0.02 and max(factors) > 0.99


def test_shapes_of_the_schedules():
    assert lr_factor("cosine", 0.1, 0.0) == 0.01  # the first step moves weights
    assert lr_factor("cosine", 0.1, 0.05) == pytest.approx(0.5)
    assert lr_factor("cosine", 0.1, 0.55) == pytest.approx(0.5)
    assert lr_factor("linear", 0.0, 0.25) == pytest.approx(0.75)
    assert lr_factor("constant", 0.1, 0.9) == 1.0
    assert lr_factor("cosine", 0.0, 1.0) == pytest.approx(0.0)


def test_time_decides_the_learning_rate_where_it_decides_the_end():
    clock = Clock(None, seconds=60.0)
    factor = lr_lambda(TrainConfig(minutes=1, schedule="linear", warmup=0.0), clock)
    clock.tick(5, 15.0)
    assert factor(5) == pytest.approx(0.75) and not clock.done() and clock.remaining() == 45.0
    clock.tick(9, 60.0)
    assert clock.done() and factor(9) == 0.0


def test_the_limit_that_is_nearer_decides():
    clock = Clock(10, seconds=100.0)
    clock.tick(5, 10.0)
    assert clock.progress() == pytest.approx(6 / 11) and clock.remaining() == pytest.approx(10.0)
    clock.tick(6, 90.0)
    assert clock.progress() == pytest.approx(0.9) and clock.remaining() == pytest.approx(10.0)
    clock.tick(10, 91.0)
    assert clock.done()


def test_time_of_earlier_runs_stays_counted(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    clock = Clock(None, 60.0)
    clock.tick(3, 20.0)
    assert clock.now() == 20.0
    clock.start()
    now[0] += 5.0
    assert clock.now() == 25.0


def test_planned_steps():
    assert plan_steps(TrainConfig(minutes=1), 100, 1) is None
    assert plan_steps(TrainConfig(epochs=2, batch_size=8), 100, 1) == 24  # the incomplete batch is dropped
    assert plan_steps(TrainConfig(epochs=2, batch_size=8, grad_accum=5), 100, 1) == 6
    assert plan_steps(TrainConfig(epochs=2, batch_size=8), 100, 2) == 12
    assert plan_steps(TrainConfig(epochs=3, batch_size=8), 5, 1) == 3  # one batch that is not full is kept
    assert plan_steps(TrainConfig(epochs=2, steps=5, batch_size=8), 100, 1) == 5
    with pytest.raises(UserError, match="empty"):
        plan_steps(TrainConfig(steps=1), 0, 1)
    with pytest.raises(UserError, match="epochs"):
        plan_steps(TrainConfig(epochs=1), None, 1)


def report(terminal: bool) -> tuple[ProgressReport, io.StringIO]:
    out = io.StringIO()
    return ProgressReport("align", Clock(100, None), 4, Console(file=out, force_terminal=terminal, width=100)), out


def test_progress_without_a_terminal_is_a_line_now_and_then(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now[0])
    shown, out = report(terminal=False)
    shown.start()
    for step in range(1, 41):
        now[0] += 1.0
        shown.clock.tick(step, float(step))
        if step == 10:
            shown.logged(LogRow(10, 2.5, {}, 10.0, 40))
        shown.step()
    shown.stop()
    lines = out.getvalue().splitlines()
    assert len(lines) == 2
    assert lines[0] == "align:  16%  step 15/100  loss 2.5  4.0 samples/s  1:25 left"


def test_progress_on_a_terminal_ends_cleanly():
    shown, out = report(terminal=True)
    shown.start()
    shown.clock.tick(50, 10.0)
    shown.step()
    shown.stop()
    assert "step 50/100" in out.getvalue()


def test_durations():
    assert [duration(s) for s in (0.4, 75.2, 3700)] == ["0:00", "1:15", "1:01:40"]


class RandomItems(torch.utils.data.Dataset):
    """Every item draws from all three global generators."""

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> tuple[int, float, float, float]:
        return index, random.random(), float(np.random.rand()), float(torch.rand(()))


def test_items_depend_on_seed_epoch_and_index_only():
    seeded = SeededDataset(RandomItems(), seed=3)
    torch.manual_seed(1)
    before = torch.get_rng_state(), random.getstate()
    together = seeded.__getitems__([4, 7, 4]).items
    assert torch.equal(before[0], torch.get_rng_state()) and before[1] == random.getstate()
    assert together[0] == together[2] == seeded[4] != together[1]
    seeded.set_epoch(1)
    assert seeded[4][0] == 4 and seeded[4] != together[0]
    assert SeededDataset(RandomItems(), seed=4)[4] != together[0]


def test_workers_and_collate_draw_the_same():
    def collate(items: list) -> list:
        return [*items, random.random()]

    def batches(workers: int) -> list:
        dataset = SeededDataset(RandomItems(), seed=3)
        sampler = EpochSampler(len(dataset), seed=3)
        loader = torch.utils.data.DataLoader(
            dataset, 5, sampler=sampler, collate_fn=SeededCollate(collate), num_workers=workers
        )
        return list(loader)

    assert batches(0) == batches(2)


def test_every_epoch_has_its_own_order():
    sampler = EpochSampler(50, seed=0)
    first = list(sampler)
    assert sorted(first) == list(range(50)) and first == list(sampler)
    sampler.set_epoch(1)
    assert list(sampler) != first
    assert list(EpochSampler(50, seed=1)) != first
