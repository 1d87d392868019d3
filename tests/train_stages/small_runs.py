"""Runs of a small model of the engine alone, and what happens to them: for tests of whatever surrounds training."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_model
from transformers import TrainerCallback

from regiontower.train_stages.engine import Part, StageResult, run_stage
from regiontower.train_stages.recipe import TrainConfig

NO_FORK = "fork" not in multiprocessing.get_all_start_methods()
FORK: Any = multiprocessing if NO_FORK else multiprocessing.get_context("fork")


@dataclass
class Recipe:
    train: TrainConfig


class Small(torch.nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head = torch.nn.Sequential(torch.nn.Linear(4, width), torch.nn.Tanh(), torch.nn.Linear(width, 1))

    def forward(self, x: torch.Tensor) -> dict:
        error = self.head(x)[:, 0] - x.sum(1)
        return {"loss": error.square().mean(), "metrics": {"error": error.mean()}}


def small_run(
    run_dir: Path, width: int = 4, callbacks: Sequence[TrainerCallback] = (), options: Any = None, **train: Any
) -> StageResult:
    """Six steps with three checkpoints. options: more of what `run_stage` takes; train: keys of `TrainConfig`."""
    config = TrainConfig(**({"steps": 6, "batch_size": 2, "log_steps": 1, "save_steps": 2} | train))
    model = Small(width)
    arguments: dict[str, Any] = {
        "model": model,
        "parts": [Part("head", ("head",), 1e-2)],
        "dataset": [torch.randn(4, generator=torch.Generator().manual_seed(n)) for n in range(12)],
        "collate": lambda items: {"x": torch.stack(items)},
        "train": config,
        "run_dir": run_dir,
        "recipe": Recipe(config),
        "stage": "align",
        "parents": {},
        "data": {},
        "save": lambda folder: save_model(model, str(folder / "model.safetensors")),
        "callbacks": callbacks,
        "device": "cpu",
    }
    return run_stage(**(arguments | (options or {})))


class At(TrainerCallback):
    """Calls `act(model)` at the end of a step, or before it."""

    def __init__(self, step: int, act: Callable[[Any], Any], before: bool = False) -> None:
        self.step, self.act, self.before = step, act, before

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if self.before and state.global_step + 1 == self.step:
            self.act(model)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if not self.before and state.global_step == self.step:
            self.act(model)


def signal_at(step: int, number: int = signal.SIGTERM) -> At:
    """Sends this process a signal before the step is taken: the run stops after it."""
    return At(step, lambda model: os.kill(os.getpid(), number), before=True)


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(run_dir / "model.safetensors")


def assert_equal_weights(one: Path, other: Path) -> None:
    """Of two finished runs, to the bit."""
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def leave_group() -> None:
    """As under torchrun before a command begins: no group of processes yet, and a port that is free."""
    port = torch.zeros((), dtype=torch.int64)
    if dist.get_rank() == 0:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port += probe.getsockname()[1]
    dist.broadcast(port, 0)
    os.environ["MASTER_PORT"] = str(int(port))  # on the old one the next group might meet what is left of this one
    dist.barrier()
    dist.destroy_process_group()
