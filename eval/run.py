"""`evaluate`: a checkpoint and a file of region records in, numbers through lmms-eval out."""

import contextlib
import json
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..train_stages.atomic_write import write_atomically
from ..train_stages.record_io import RecordSet, data_hash, read_records
from ..vision_towers.errors import UserError
from .breakdown import by_box_size, by_distractors
from .confidence import confidence_figures
from .conventions import bind
from .judge import Judge, judge_samples
from .lmms_run import ask
from .opened import OpenedModel, Opening, open_model
from .response_log import log_files
from .samples import box_view, flat_samples, region_view
from .scoring import summarise
from .task_folder import require_lmms_eval, rows_or_error
from .task_kinds import ALL_TASKS, BOX_KINDS
from .task_rows import TaskRow, task_names, task_rows

if TYPE_CHECKING:
    from .opened import Model

_STAMPED = ("regiontower", "lmms-eval", "torch", "transformers", "datasets", "numpy", "pillow")
RESULTS_NAME = "results.json"
RESPONSES_NAME = "responses.jsonl"


@dataclass(frozen=True)
class EvalResult:
    """results: what `OUT/results.json` holds. samples: task name -> its rows with question, answer, target and score,
    by doc_id, as in `OUT/samples_<task>.jsonl`. out: the folder."""

    results: dict[str, Any]
    samples: dict[str, list[dict[str, Any]]]
    out: Path

    @property
    def tasks(self) -> dict[str, dict]:
        """Task name -> `{"n", its figures, "ci95"}`."""
        return self.results["tasks"]


def evaluate(
    model: "Model",
    data: str | Path,
    tasks: Sequence[str] | None = None,
    out: str | Path = "eval_out",
    *,
    format: str = "records",
    image_root: str | Path | None = None,
    limit: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    quant: str = "none",
    batch_size: int = 16,
    progress: bool = True,
) -> EvalResult:
    """Run our tasks over `data` through lmms-eval and write `OUT/results.json` and `OUT/samples_<task>.jsonl`.

    A run that was cut off (no `results.json` in OUT) is continued from `OUT/responses.jsonl`: only what is missing is
    asked. A finished one is done again from the start. The random state of the process, and the model's train or eval
    mode, are as before afterwards.

    Args:
        model: folder or hub id of a checkpoint, or `(model, processor)` in memory, or a ready `RegionTowerChat`, or a
            model of another class of lmms-eval (`foreign.ForeignModel`).
        data: file of region records.
        tasks: names out of `task_kinds.RECORD_TASKS`; None for the four of `TASKS`. One without a row reports n = 0 and
            None for its figures.
        out: folder of the results, made if needed.
        format, image_root: as `train_stages.record_io.read_records` takes them.
        limit: at most so many rows a task, spread evenly over the images.
        device, dtype, quant: of a model that is loaded here.
        batch_size: questions a batch (not of a `RegionTowerChat`, which has its own).
        progress: show a bar with the time left on stderr.

    Raises:
        UserError: lmms-eval is not installed, several processes, an unknown task, unreadable data, no rows at all.
        Exception: whatever the model raises, as it is.
    """
    check_processes()
    records = read_records(data, format=format, image_root=image_root, check_images=True)
    rows = rows_or_error(task_rows(records, tasks=task_names(tasks), limit=limit), data)
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    start_over_if_finished(folder, result_files(folder))
    opened = open_model(model, folder / RESPONSES_NAME, Opening(device, dtype, quant, batch_size, progress))
    arguments = {
        "tasks": list(rows),
        "image_root": None if image_root is None else str(image_root),
        "limit": limit,
        "dtype": dtype,
        "quant": quant,
    }
    return answer_rows(opened, rows, folder, data=described(records, data, format), arguments=arguments)


def answer_rows(
    opened: OpenedModel,
    rows: Mapping[str, Sequence[TaskRow]],
    folder: Path,
    *,
    data: Mapping[str, Any],
    arguments: Mapping[str, Any],
    judge: Judge | None = None,
) -> EvalResult:
    """Ask an opened model these rows, score its answers, write the files of a run into `folder` (which exists).

    Args:
        rows: task name -> rows.
        data: what the results say about where the rows came from (`described`).
        arguments: what they say about how they were asked; the model's own are added.
        judge: of the answers that only a judge can score; without one those tasks have no score.
    """
    started = time.monotonic()
    how = opened.convention
    asked = {
        name: list(found) if how is None else [bind(name, row, how) for row in found] for name, found in rows.items()
    }
    logged = ask(opened, asked)
    samples = {name: flat_samples(name, logged.get(name, []), asked[name], opened) for name in asked}
    for name, found in samples.items():
        if ALL_TASKS[name] == "judged":
            judge_samples(judge, found, asked[name], folder)
    views = {
        name: [box_view(row, sample) for row, sample in zip(asked[name], found, strict=True)]
        for name, found in samples.items()
        if ALL_TASKS[name] in BOX_KINDS - {"absent"}  # nothing true to be sure of
    }
    sure = {name: confidence_figures(found) for name, found in views.items()}
    results = {
        "tasks": {name: _figures(name, found, sure) for name, found in samples.items()},
        "model": opened.name,
        "weights_sha256": opened.weights_sha256,
        "box_format": opened.box_format,
        "convention": None if how is None else how.name,
        "data": dict(data),
        "breakdown": {name: _breakdown(asked[name], found) for name, found in samples.items() if found},
        "calibration": {name: bins for name, (_, _, bins) in sure.items() if bins},
        "judge": None if judge is None else judge.model,
        "arguments": {**arguments, **opened.arguments},
        **stamp(opened),
        "seconds": round(time.monotonic() - started, 2),
    }
    for name, found in samples.items():
        write_rows(samples_file(folder, name), found)
    # Last, and at once: its presence says that the run is complete.
    write_json(folder / RESULTS_NAME, results)
    return EvalResult(results, samples, folder)


def check_processes() -> None:
    """A UserError unless lmms-eval is there and this is the only process."""
    require_lmms_eval()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            "evaluate runs in one process; for several start torchrun -m lmms_eval --model regiontower with the folder "
            "that regiontower lmms-tasks prints"
        )


def described(records: RecordSet, data: str | Path, format: str) -> dict[str, Any]:
    """What results say about a file of region records."""
    return {
        "path": str(data),
        "sha256": data_hash(records),
        "format": format,
        "records": len(records.records),
        "bad_records": [f"{bad.line}: {bad.reason}" for bad in records.bad],
    }


def _figures(name: str, samples: list[dict], sure: Mapping[str, tuple[dict, dict, list]]) -> dict:
    figures = summarise(ALL_TASKS[name], samples)
    further, intervals, _ = sure.get(name, ({}, {}, []))
    return figures if not further else {**figures, **further, "ci95": {**figures["ci95"], **intervals}}


def _breakdown(rows: Sequence[TaskRow], samples: Sequence[dict]) -> dict[str, list[dict]]:
    views = [region_view(row, sample) for row, sample in zip(rows, samples, strict=True) if "correct" in sample]
    parts = {"by_box_size": by_box_size(views), "by_distractors": by_distractors(views)}
    return {name: groups for name, groups in parts.items() if groups}


def start_over_if_finished(folder: Path, written: Iterable[Path]) -> None:
    """A finished run's answers are not reused (the code may have changed); an old result must not outlive a crash.

    written: what such a run leaves beside its results and its response log.
    """
    results = folder / RESULTS_NAME
    if results.is_file():
        for file in (results, *written, *log_files(folder / RESPONSES_NAME)):
            file.unlink(missing_ok=True)


def result_files(folder: Path) -> list[Path]:
    """What `answer_rows` writes at its end, there or not; the response log is not among them."""
    return [folder / RESULTS_NAME, *(samples_file(folder, task) for task in ALL_TASKS)]


def samples_file(folder: Path, task: str) -> Path:
    """Where the rows of a task stand."""
    return folder / f"samples_{task}.jsonl"


def stamp(opened: OpenedModel) -> dict[str, Any]:
    """`{"versions": package -> its version or None, "machine": where it ran}`."""
    from ..train_stages.engine.manifest import machine  # with the whole of training behind it

    place = torch.device("cpu") if opened.module is None else next(opened.module.parameters()).device
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    return {"versions": {name: _version(name) for name in _STAMPED}, "machine": machine(place, processes)}


def _version(name: str) -> str | None:
    with contextlib.suppress(PackageNotFoundError):
        return version(name)
    return None


def write_json(path: Path, value: Any) -> None:
    """A file that is there whole or not at all."""
    write_atomically(path, json.dumps(value, ensure_ascii=False, indent=2) + "\n")


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """The same with a line a row."""
    write_atomically(path, "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows))
