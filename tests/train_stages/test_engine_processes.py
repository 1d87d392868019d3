"""Two gloo processes train what one process trains at the same global batch."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_model
from torch import nn
from transformers import TrainerCallback

from regiontower.train_stages.engine import Part, run_stage
from regiontower.train_stages.engine.run_log import LOG_FILE, LogRow, read_rows
from regiontower.train_stages.recipe import TrainConfig


@dataclass
class Recipe:
    train: TrainConfig


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tower, self.head = nn.Linear(4, 8), nn.Linear(8, 1)

    def forward(self, x: torch.Tensor) -> dict:
        error = self.head(self.tower(x).tanh())[:, 0] - x.sum(1)
        return {"loss": error.square().mean(), "metrics": {"rows": float(len(x)), "error": error.mean()}}


class Rows(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.randn(4)  # seeded by the engine: the same in whatever process


class StopInStep4(TrainerCallback):
    """Only one of the processes hears of it; both must stop."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 3 and args.process_index == 1:
            signal.raise_signal(signal.SIGTERM)


def train(run_dir: Path, batch_size: int, stop: bool = False) -> None:
    config = TrainConfig(
        steps=7, batch_size=batch_size, optimizer="sgd", log_steps=1, max_grad_norm=0.0, schedule="constant"
    )
    model = Model()
    run_stage(
        model=model,
        parts=[Part("tower", ("tower",), 0.0), Part("head", ("head",), 0.05)],
        dataset=Rows(),
        collate=lambda items: {"x": torch.stack(items)},
        train=config,
        run_dir=run_dir,
        recipe=Recipe(config),
        stage="pretrain",
        parents={},
        data={},
        save=lambda folder: save_model(model, str(folder / "model.safetensors")),
        callbacks=[StopInStep4()] if stop else [],
        device="cpu",
    )


def in_rank(rank: int, port: int, arguments: tuple) -> None:
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()})
    train(*arguments)


def in_two_processes(*arguments) -> list[int | None]:
    """Exit codes of both. Forked: a fresh interpreter would import transformers for longer than the test runs."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=in_rank, args=(rank, port, arguments)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=120)
        process.kill()
    return [process.exitcode for process in processes]


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork")
def test_two_processes_equal_one_and_resume(tmp_path, capfd):
    # 20 rows in global batches of 4: the run stops within its first epoch and resumes into the second.
    train(tmp_path / "one", 4)
    assert in_two_processes(tmp_path / "two", 2) == [0, 0]
    assert in_two_processes(tmp_path / "again", 2, True) == [75, 75]  # stopped from outside, to be gone on with
    stage = json.loads((tmp_path / "again" / "stage.json").read_text())
    assert (stage["status"], stage["steps"], stage["machine"]["processes"]) == ("interrupted", 4, 2)
    assert not (tmp_path / "again" / "model.safetensors").exists()
    capfd.readouterr()
    assert in_two_processes(tmp_path / "again", 2) == [0, 0]
    assert capfd.readouterr().err.count("What trains") == 1  # one process speaks

    one = read_rows(tmp_path / "one" / LOG_FILE, LogRow)
    expected_weights = load_file(tmp_path / "one" / "model.safetensors")
    for name in ("two", "again"):
        rows = read_rows(tmp_path / name / LOG_FILE, LogRow)
        assert [row.step for row in rows] == [row.step for row in one] == list(range(1, 8))
        for row, expected in zip(rows, one, strict=True):
            assert row.loss == pytest.approx(expected.loss, abs=1e-5)
            assert row.metrics["error"] == pytest.approx(expected.metrics["error"], abs=1e-5)
            assert row.samples == expected.samples == 4 * row.step
            assert row.metrics["rows"] == 2.0 and expected.metrics["rows"] == 4.0
        weights = load_file(tmp_path / name / "model.safetensors")
        assert all(torch.allclose(weights[key], expected_weights[key], atol=1e-6) for key in expected_weights)
