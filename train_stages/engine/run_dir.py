"""Run directories: what stands there, and whether a run starts, resumes or is already done."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from ...mllm.adapters import adapter_base
from ...vision_towers.errors import UserError
from ...vision_towers.packaged import model_source
from ..recipe import differences, plain, read_yaml
from .checkpoint_files import damage
from .manifest import STAGE_FILE, read_run
from .plots import PLOT_FILE
from .run_log import EVAL_FILE, LOG_FILE

RECIPE_FILE = "recipe.yaml"
CHECKPOINTS = "checkpoints"
ADAPTER_FILES = ("adapter_config.json",)  # would make the next run's whole model pass for an adapter
_STEP = re.compile(r"step_(\d+)")
_KEPT = (
    "this very run was not finished, so it goes on: --overwrite removes a finished run or another one; to begin again, "
    "delete the directory"
)


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
        overwrite: remove the run that stands there (its own files only). One that is this very run and not finished
            goes on all the same, so that a job that is stopped and started again with one command arrives.
        processes: of the run to come. It may differ from the run's before when `train.batch_size` makes up for it.

    Raises:
        UserError: the directory holds a run of another recipe, data or parent (says what differs), a model of unknown
            origin, or a parent of the run to come.
    """
    if run_dir.exists() and not run_dir.is_dir():
        raise UserError(f"{run_dir} is a file; a run directory is needed.")
    _refuse_parents_within(run_dir, parents)
    run_dir.mkdir(parents=True, exist_ok=True)
    there = read_run(run_dir)
    if there is None:
        if any(run_dir.glob("*.safetensors")):
            raise UserError(f"{run_dir} holds a model but no run; choose a new directory, its files would be lost.")
        return RunPlan()
    before = {"stage": there["stage"], "data": there["data"], "parents": _hashes(there["parents"])}
    now = {"stage": stage, "data": dict(data), "parents": _hashes(parents)}
    before["recipe"], now["recipe"] = _saved_recipe(type(recipe), run_dir, overwrite), plain(recipe)
    _same_batch_over_processes(before["recipe"], there["machine"]["processes"], now["recipe"], processes)
    changes = differences(before, now)
    if overwrite and (changes or there["status"] == "finished"):
        remove_run(run_dir)
        return RunPlan()
    if changes:
        listed = "; ".join(changes[:3]) + ("; ..." if len(changes) > 3 else "")
        raise UserError(f"{run_dir} holds another run ({listed}): choose a new directory or use --overwrite.")
    if there["status"] == "finished":
        return RunPlan(finished=True)
    return _plan_to_go_on(run_dir, notes=[_KEPT] if overwrite else [])


def _refuse_parents_within(run_dir: Path, parents: Mapping[str, Mapping[str, Any]]) -> None:
    """A run writes its model into its directory, and --overwrite removes one there: no parent may be lost by that."""
    for role, record in parents.items():
        parent = Path(model_source(record["path"]))
        for folder in _with_bases(parent):
            if folder.resolve().is_relative_to(run_dir.resolve()):
                what = role if folder == parent else f"{role}'s base"
                raise UserError(
                    f"{run_dir}: no run can be written where its own {what} lies ({folder}); choose another directory."
                )


def _with_bases(model: Path) -> Iterator[Path]:
    """The folder of a model and, while it is an adapter, of the model it belongs to; nothing of what is on a hub."""
    seen: set[Path] = set()
    while model.is_dir() and model.resolve() not in seen:
        yield model
        seen.add(model.resolve())
        if (base := adapter_base(model)) is None:
            return
        model = Path(model_source(base.path))


def _saved_recipe(kind: type, run_dir: Path, overwrite: bool) -> dict[str, Any]:
    """A run's recipe with the keys it would have today: those added since then have their defaults."""
    try:
        saved = read_yaml(run_dir / RECIPE_FILE)
    except UserError:
        if not overwrite:
            raise
        return {}  # it differs from every recipe, so what stands there will be removed
    try:
        return plain(TypeAdapter(kind).validate_python(saved))
    except ValidationError:  # a recipe of another kind: the differences will say so
        return saved if isinstance(saved, dict) else {}


def _same_batch_over_processes(before: dict, processes_before: int, now: dict, processes: int) -> None:
    """A batch cut up for another number of processes is the same batch: its size is then no difference."""
    old, new = before.get("train"), now.get("train")
    if not isinstance(old, dict) or not isinstance(new, dict):
        return
    sizes: Any = old.get("batch_size"), new.get("batch_size")
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


def _plan_to_go_on(run_dir: Path, notes: list[str]) -> RunPlan:
    """From the newest checkpoint that is whole; damaged ones are set aside, so that they do not count as the newest."""
    damaged = False
    for checkpoint in reversed(checkpoints(run_dir)):
        wrong = damage(checkpoint)
        if wrong is None:
            return RunPlan(checkpoint=checkpoint, notes=tuple(notes))
        aside = checkpoint.with_name(f"damaged_{checkpoint.name}")
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(checkpoint, aside)
        damaged = True
        notes.append(f"{checkpoint.name} cannot be used ({wrong}; kept as {aside.name}): taking the one before")
    if damaged:
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
