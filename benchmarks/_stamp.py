"""What every committed result says of the runs, the machine and the versions behind it. No paths."""

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from regiontower.train_stages.engine.manifest import machine, read_stage


def stamp(runs: Mapping[str, Path]) -> dict[str, Any]:
    """`runs`: stage -> run directory."""
    stages = {}
    for name, run in runs.items():
        stage = read_stage(run) or {}
        stages[name] = {key: stage.get(key) for key in ("steps", "samples", "seconds", "final_loss")}
        stages[name]["parameters"] = sum(row["parameters"] for row in stage.get("parts", []))
    names = ("regiontower", "torch", "transformers", "lmms-eval")
    return {
        "stages": stages,
        "machine": machine(torch.device("cpu"), 1),
        "versions": {name: version(name) for name in names},
    }
