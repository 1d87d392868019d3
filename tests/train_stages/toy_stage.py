"""A stage on a toy model: what a whole run is tested with."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_model
from torch import nn

from regiontower.train_stages.engine import Part, run_stage
from regiontower.train_stages.engine.run_log import LOG_FILE, LogRow, read_rows
from regiontower.train_stages.recipe import TrainConfig


@dataclass(frozen=True)
class ToyRecipe:
    train: TrainConfig
    lr: dict[str, float]


class ToyModel(nn.Module):
    """A frozen layer with running statistics, a trained one with dropout, and a bias that shares its storage."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.tower = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
        self.head = nn.Sequential(nn.Dropout(0.3), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))
        self.shift = nn.Parameter(torch.zeros(1))
        self.same_shift = self.shift

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> dict:
        error = self.head(self.tower(x))[:, 0] + self.same_shift - y
        metrics = {"bias": error.mean(), "rows": float(len(x))}
        return {"loss": error.square().mean(), "metrics": metrics}


class NoisyRows(torch.utils.data.Dataset):
    """Rows with an augmentation that draws from the global generators."""

    def __init__(self, count: int = 12) -> None:
        self.x = torch.randn(count, 4, generator=torch.Generator().manual_seed(5))

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.x[index]
        return x + 0.1 * torch.randn(4) * random.random(), x.sum()


def stack(items: list) -> dict[str, torch.Tensor]:
    return {"x": torch.stack([x for x, _ in items]), "y": torch.stack([y for _, y in items])}


TRAIN = TrainConfig(steps=8, batch_size=2, weight_decay=0.1, log_steps=1, save_steps=3, warmup=0.25)


def run(run_dir: Path, train: TrainConfig = TRAIN, model: nn.Module | None = None, **changes):
    model = ToyModel() if model is None else model
    lr = {"tower": 0.0, "head": 1e-2}
    arguments = {
        "model": model,
        "parts": [Part("tower", ("tower",), lr["tower"]), Part("head", ("head", "shift"), lr["head"])],
        "dataset": NoisyRows(),
        "collate": stack,
        "train": train,
        "run_dir": run_dir,
        "recipe": ToyRecipe(train, lr),
        "stage": "align",
        "parents": {},
        "data": {"rows": "abc"},
        "save": lambda folder: save_model(model, str(folder / "model.safetensors")),
        "device": "cpu",
    }
    return run_stage(**(arguments | changes))


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(run_dir / "model.safetensors")


def assert_same_run(one: Path, other: Path) -> None:
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name
    assert [(row.step, row.loss, row.lr, row.metrics) for row in read_rows(one / LOG_FILE, LogRow)] == [
        (row.step, row.loss, row.lr, row.metrics) for row in read_rows(other / LOG_FILE, LogRow)
    ]


def stage_of(run_dir: Path) -> dict:
    return json.loads((run_dir / "stage.json").read_text())
