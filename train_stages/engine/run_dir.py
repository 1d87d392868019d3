"""Run directories: what stands there, and whether a run starts, resumes or is already done."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from ...vision_towers.errors import UserError
from ..recipe import differences, plain, read_yaml
from .checkpoint_files import damage
from .manifest import STAGE_FILE, read_stage
from .plots import PLOT_FILE
from .run_log import EVAL_FILE, LOG_FILE

RECIPE_FILE = "recipe.yaml"
CHECKPOINTS = "checkpoints"
ADAPTER_FILES = ("adapter_config.json",)  # would make the next run's whole model pass for an adapter
_STEP = re.compile(r"step_(\d+)")


@dataclass(frozen=True)
class RunPlan:
    """`finished`: nothing to do. Otherwise start from scratch, or from `checkpoint` when there is one. `notes`: what
    the user should hear about it."""

    finished: bool = False
    checkpoint: Path | None = None
    notes: tuple[str, ...] = ()


def plan_run(
    run_dir: Path,
    *,
    stage: str,
    recipe: object,
    data: Mapping[str, str],
    parents: Mapping[str, Mapping[str, Any]],
    overwrite: bool,
    processes: int = 1,
) -> RunPlan:
    """Look at `run_dir` (created when absent) and decide.

    Args:
        recipe, data, parents: of the run to come: data name -> hash, parent name -> `parent_record`.
        overwrite: remove the run that stands there (its own files only).
        processes: of the run to come. It may differ from the run's before when `train.batch_size` makes up for it.

    Raises:
        UserError: the directory holds a run of another recipe, data or parent (says what differs), or a model of
            unknown origin.
    """
    if run_dir.exists() and not run_dir.is_dir():
        raise UserError(f"{run_dir} is a file; a run directory is needed.")
    run_dir.mkdir(parents=True, exist_ok=True)
    there = read_stage(run_dir)
    if there is not None and overwrite:
        remove_run(run_dir)
        there = None
    if there is None:
        if any(run_dir.glob("*.safetensors")):
            raise UserError(f"{run_dir} holds a model but no run; choose a new directory, its files would be lost.")
        return RunPlan()
    before = {"stage": there["stage"], "data": there["data"], "parents": _hashes(there["parents"])}
    now = {"stage": stage, "data": dict(data), "parents": _hashes(parents)}
    before["recipe"], now["recipe"] = _read_as(type(recipe), run_dir / RECIPE_FILE), plain(recipe)
    _same_batch_over_processes(before["recipe"], there["machine"]["processes"], now["recipe"], processes)
    if changes := differences(before, now):
        listed = "; ".join(changes[:3]) + ("; ..." if len(changes) > 3 else "")
        raise UserError(f"{run_dir} holds another run ({listed}): choose a new directory or use --overwrite.")
    if there["status"] == "finished":
        return RunPlan(finished=True)
    return _plan_to_go_on(run_dir)


def _read_as(kind: type, path: Path) -> dict[str, Any]:
    """A saved recipe with the keys it would have today: those added since then have their defaults."""
    saved = read_yaml(path)
    try:
        return plain(TypeAdapter(kind).validate_python(saved))
    except ValidationError:  # a recipe of another kind: the differences will say so
        return saved


def _same_batch_over_processes(before: dict, processes_before: int, now: dict, processes: int) -> None:
    """A batch cut up for another number of processes is the same batch: its size is then no difference."""
    old, new = before.get("train", {}), now.get("train", {})
    sizes = old.get("batch_size"), new.get("batch_size")
    if None not in sizes and sizes[0] * processes_before == sizes[1] * processes:
        old["batch_size"] = new["batch_size"]


def checkpoints(run_dir: Path) -> list[Path]:
    """Complete checkpoints, oldest first (an unfinished one does not carry the name `step_N`)."""
    found = []
    for path in (run_dir / CHECKPOINTS).glob("step_*"):
        if match := _STEP.fullmatch(path.name):
            found.append((int(match[1]), path))
    return [path for _, path in sorted(found)]


def last_checkpoint(run_dir: Path) -> Path | None:
    """The newest complete checkpoint."""
    return next(reversed(checkpoints(run_dir)), None)


def _plan_to_go_on(run_dir: Path) -> RunPlan:
    """From the newest checkpoint that is whole; damaged ones are set aside, so that they do not count as the newest."""
    notes = []
    for checkpoint in reversed(checkpoints(run_dir)):
        wrong = damage(checkpoint)
        if wrong is None:
            return RunPlan(checkpoint=checkpoint, notes=tuple(notes))
        aside = checkpoint.with_name(f"damaged_{checkpoint.name}")
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(checkpoint, aside)
        notes.append(f"{checkpoint.name} cannot be used ({wrong}; kept as {aside.name}): taking the one before")
    if notes:
        notes.append("no checkpoint is left: starting from the beginning")
    return RunPlan(notes=tuple(notes))


def remove_run(run_dir: Path) -> None:
    """Remove a run's own files; whatever else a user keeps in the directory stays.

    stage.json goes last: as long as it stands, the rest is known to be a run's.
    """
    for file in run_dir.glob("*.safetensors*"):  # weights of the old run must not pass for those of the new one
        file.unlink()
    shutil.rmtree(run_dir / CHECKPOINTS, ignore_errors=True)
    for name in (*ADAPTER_FILES, LOG_FILE, EVAL_FILE, PLOT_FILE, RECIPE_FILE, STAGE_FILE):
        (run_dir / name).unlink(missing_ok=True)


def _hashes(parents: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """What makes a parent the same one: its weights, or its name where they are not at hand."""
    return {name: record["weights_sha256"] or record["path"] for name, record in parents.items()}
