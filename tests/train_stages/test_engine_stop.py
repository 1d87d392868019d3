"""Signals as schedulers and launchers send them: several times, and to every process of a job."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_model
from transformers import TrainerCallback

from regiontower.train_stages.engine import Part, interrupt, run_stage
from regiontower.train_stages.engine.interrupt import EXIT_STATUS
from regiontower.train_stages.engine.run_dir import checkpoints
from regiontower.train_stages.recipe import TrainConfig

pytestmark = pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork")
FORK = multiprocessing.get_context("fork") if "fork" in multiprocessing.get_all_start_methods() else multiprocessing


@dataclass
class Recipe:
    train: TrainConfig


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = torch.nn.Linear(4, 1)

    def forward(self, x: torch.Tensor) -> dict:
        return {"loss": (self.head(x)[:, 0] - x.sum(1)).square().mean()}


class InStep3(TrainerCallback):
    def __init__(self, act) -> None:
        self.act = act

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 2:
            self.act()


def train(run_dir: Path, act, workers: int = 0, same_request: float = interrupt.SAME_REQUEST) -> None:
    os.setpgrp()
    interrupt.SAME_REQUEST = same_request
    config = TrainConfig(steps=6, batch_size=2, log_steps=1, workers=workers)
    model = Model()
    run_stage(
        model=model,
        parts=[Part("head", ("head",), 1e-2)],
        dataset=[torch.randn(4, generator=torch.Generator().manual_seed(n)) for n in range(12)],
        collate=lambda items: {"x": torch.stack(items)},
        train=config,
        run_dir=run_dir,
        recipe=Recipe(config),
        stage="align",
        parents={},
        data={},
        save=lambda folder: save_model(model, str(folder / "model.safetensors")),
        callbacks=[InStep3(act)],
        device="cpu",
    )


def twice() -> None:
    signal.raise_signal(signal.SIGTERM)
    time.sleep(0.05)
    signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize(("same_request", "status"), [(2.0, EXIT_STATUS), (0.0, -signal.SIGTERM)])
def test_a_signal_that_comes_twice_at_once_is_one_request_and_a_later_one_ends_the_run(tmp_path, same_request, status):
    """torchrun hands on what the scheduler has sent to its processes, too."""
    process = FORK.Process(target=train, args=(tmp_path / "run", twice, 0, same_request))
    process.start()
    process.join(timeout=100)
    assert process.exitcode == status
    assert [path.name for path in checkpoints(tmp_path / "run")] == (["step_3"] if status == EXIT_STATUS else [])


def test_a_signal_to_the_whole_job_does_not_cost_the_processes_that_load_data(tmp_path):
    """Whose death would end the training process before it has saved."""
    there = tmp_path / "there"

    def wait() -> None:
        there.touch()
        time.sleep(2)

    process = FORK.Process(target=train, args=(tmp_path / "run", wait, 1))
    process.start()
    for _ in range(1000):
        if there.exists():
            break
        time.sleep(0.05)
    assert process.pid is not None
    os.killpg(process.pid, signal.SIGTERM)
    process.join(timeout=100)
    assert process.exitcode == EXIT_STATUS
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["step_3"]
    with pytest.raises(ProcessLookupError):  # nobody is left
        os.killpg(process.pid, 0)
