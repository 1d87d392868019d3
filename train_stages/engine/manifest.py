"""What a run was made of: hashes, versions, machine, parents; and `stage.json`, where it is written down."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from ...vision_towers.errors import UserError
from ...vision_towers.packaged import model_source
from ...vision_towers.weights_hash import weights_hash
from ..atomic_write import write_atomically

STAGE_FILE = "stage.json"
_PACKAGES = ("regiontower", "torch", "torchvision", "transformers", "accelerate", "peft", "numpy", "pillow")
_PARENT_KEYS = ("stage", "status", "steps", "seconds", "final_loss", "data")
_MEND = "delete it to start the run again."


@dataclass
class _Parent:
    path: str
    weights_sha256: str | None


@dataclass
class _Machine:
    processes: int


@dataclass
class _Run:
    """What is read again of a run's stage.json."""

    stage: str
    status: Literal["running", "interrupted", "finished"]
    steps: int
    seconds: float
    final_loss: float | None
    metrics: dict[str, float]
    data: dict[str, str]
    parents: dict[str, _Parent]
    machine: _Machine


_RUN = TypeAdapter(_Run)


def parent_record(parent: Path | str) -> dict[str, Any]:
    """`{"path", "weights_sha256", "stage": summary of its own stage.json or None}`.

    A parent that is no directory here (the id of a model on a hub) has no hash.
    """
    folder = Path(model_source(parent))
    if not folder.is_dir():
        return {"path": str(parent), "weights_sha256": None, "stage": None}
    stage = read_stage(folder)
    return {
        "path": str(parent),
        "weights_sha256": weights_hash(folder),
        "stage": {key: stage[key] for key in _PARENT_KEYS if key in stage} if stage else None,
    }


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide the numbers."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def machine(device: torch.device, processes: int) -> dict[str, Any]:
    """Where the run took place; no host or user names."""
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "processes": processes,
    }


def read_stage(run_dir: Path) -> dict[str, Any] | None:
    """What stage.json says there, or None where there is none.

    Raises:
        UserError: the file is not a JSON object.
    """
    path = run_dir / STAGE_FILE
    if not path.is_file():
        return None
    try:
        stage = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); {_MEND}") from None
    if not isinstance(stage, dict):
        raise UserError(f"{path}: not a run's record, which is a JSON object; {_MEND}")
    return stage


def read_run(run_dir: Path) -> dict[str, Any] | None:
    """The stage.json of a run of this engine, or None where there is none.

    Raises:
        UserError: the file is not what the engine writes.
    """
    stage = read_stage(run_dir)
    if stage is None:
        return None
    try:
        _RUN.validate_python(stage)
    except ValidationError as error:
        first = error.errors()[0]
        wrong = f"{'.'.join(str(step) for step in first['loc'])}: {first['msg']}"
        raise UserError(f"{run_dir / STAGE_FILE}: not a run's record ({wrong}); {_MEND}") from None
    return stage


def write_stage(run_dir: Path, stage: Mapping[str, Any]) -> None:
    """Write stage.json at once or not at all."""
    write_atomically(run_dir / STAGE_FILE, json.dumps(stage, indent=2, ensure_ascii=False) + "\n")
