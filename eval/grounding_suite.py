"""The suite `grounding`: every referring and grounding task over several sources, one model, one folder, one report."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from ..train_stages.record_io import read_records
from ..vision_towers.errors import UserError
from .judge import Judge
from .official import OFFICIAL_SETS, Absent, data_root, official_rows
from .official.own import own_records
from .opened import OpenedModel, Opening, open_model
from .report import REPORT_NAME, write_suite_report
from .run import (
    RESPONSES_NAME,
    RESULTS_NAME,
    EvalResult,
    answer_rows,
    check_processes,
    described,
    result_files,
    stamp,
    start_over_if_finished,
    write_json,
)
from .task_folder import evaluation_scenes
from .task_kinds import ALL_TASKS, OFFICIAL_TASKS, RECORD_TASKS, task_names
from .task_rows import TaskRow, task_rows

if TYPE_CHECKING:
    from .opened import Model

SCENES = "scenes"  # as a data file: generated ones


@dataclass(frozen=True)
class GroundingData:
    """What a suite asks about.

    Attributes:
        data: files of region records; `SCENES` for the generated evaluation scenes.
        data_root: folder of official files and of own `NAME/val.jsonl` (`official.layout`); None for
        `REGIONTOWER_DATA`. tasks: names out of `task_kinds.ALL_TASKS`; None for all.
        format, image_root: of the files in `data`.
        limit: at most so many rows a task and source.
    """

    data: Sequence[str | Path] = ()
    data_root: str | Path | None = None
    tasks: Sequence[str] | None = None
    format: str = "records"
    image_root: str | Path | None = None
    limit: int | None = None


@dataclass(frozen=True)
class Source:
    """Rows of one origin: task name -> rows, and what results say about the origin."""

    name: str
    rows: dict[str, list[TaskRow]]
    data: dict[str, Any]


@dataclass(frozen=True)
class GroundingResult:
    """results: what `OUT/results.json` holds. sources: name -> its own results and samples. out: the folder."""

    results: dict[str, Any]
    sources: dict[str, EvalResult] = field(default_factory=dict)
    out: Path = Path()

    @property
    def tasks(self) -> dict[str, dict]:
        """ "source/task" -> figures."""
        return self.results["tasks"]


def find_sources(wanted: GroundingData) -> tuple[list[Source], dict[str, str]]:
    """The sources that are there, and name -> reason of the benchmarks that are not.

    Without any data, generated scenes. A benchmark whose folder is missing under the data root is left out, unless one
    of its tasks is asked by name; one of which a part is missing is an error.

    Raises:
        UserError: an unknown task, unreadable data, missing or unofficial files, or no row at all.
    """
    root = data_root(wanted.data_root)
    names = list(ALL_TASKS) if wanted.tasks is None else task_names(wanted.tasks, ALL_TASKS)
    found: list[Source] = []
    for item in wanted.data or ([SCENES] if root is None else []):
        found += _record_sources(item, names, wanted)
    skipped: dict[str, str] = {}
    if root is not None:
        for own in own_records(root):
            found += _source(own.name, own.path, own.format, own.image_root, names, wanted.limit)
        for benchmark in OFFICIAL_SETS:
            asked = [name for name in names if name in benchmark.tasks]
            try:
                rows = {name: official_rows(root, name, wanted.limit) for name in asked}
            except Absent as reason:
                if wanted.tasks is not None:
                    raise
                skipped[benchmark.name] = str(reason)
                continue
            if rows:
                data = {
                    "path": str(root / benchmark.name),
                    "sha256": None,
                    "page": benchmark.page,
                    "format": "official",
                }
                found.append(Source(benchmark.name, rows, data))
    elif wanted.tasks is not None and (official := [name for name in names if name in OFFICIAL_TASKS]):
        official_rows(None, official[0])  # says what it needs
    if not any(rows for source in found for rows in source.rows.values()):
        raise UserError(
            f"there is no row for {', '.join(names)}: give --data FILE, or --data-root DIR with benchmarks in it"
        )
    return _named_apart(found), skipped


def run_grounding_suite(
    model: Model,
    out: str | Path,
    wanted: GroundingData,
    *,
    how: Opening | None = None,
    judge: Judge | None = None,
) -> GroundingResult:
    """Ask one model everything, and write `OUT/results.json`, `OUT/report.html` and, for each source, `OUT/SOURCE/` as
    `run.evaluate` does.

    A run that was cut off (no `OUT/results.json`) is continued: only what is missing is asked. A finished one is done
    again from the start.

    Args:
        model: as `run.evaluate` takes it.
        how: the model is opened and asked; as `Opening` says by itself when absent.
        judge: of Ferret-Bench's answers; without one they are given, and have no score.

    Raises:
        UserError: as `find_sources` and `run.evaluate`.
    """
    check_processes()
    how = how or Opening()
    sources, skipped = find_sources(wanted)
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    parts = [file for source in sources for file in result_files(folder / source.name)]
    start_over_if_finished(folder, [folder / REPORT_NAME, *parts])
    started = time.monotonic()
    opened = open_model(model, folder / RESPONSES_NAME, how)
    return ask_suite(opened, folder, sources, skipped, wanted, how, judge, started)


def ask_suite(
    opened: OpenedModel,
    folder: Path,
    sources: Sequence[Source],
    skipped: Mapping[str, str],
    wanted: GroundingData,
    how: Opening,
    judge: Judge | None,
    started: float,
) -> GroundingResult:
    """The same of an opened model and found sources. started: `time.monotonic()` when it began to open."""
    console = Console(stderr=True, quiet=not how.progress)
    arguments = _arguments(wanted, how)
    found: dict[str, EvalResult] = {}
    for position, source in enumerate(sources, start=1):
        count = sum(map(len, source.rows.values()))
        console.print(f"{source.name} ({position} of {len(sources)}): {count} questions", markup=False, highlight=False)
        part = folder / source.name
        part.mkdir(parents=True, exist_ok=True)
        for file in result_files(part):
            file.unlink(missing_ok=True)
        found[source.name] = answer_rows(
            opened,
            source.rows,
            part,
            data=source.data,
            arguments={**arguments, "tasks": list(source.rows)},
            judge=judge,
        )
    results = {
        "suite": "grounding",
        "tasks": {
            f"{name}/{task}": figures for name, result in found.items() for task, figures in result.tasks.items()
        },
        "model": opened.name,
        "weights_sha256": opened.weights_sha256,
        "box_format": opened.box_format,
        "convention": None if opened.convention is None else opened.convention.name,
        "sources": {name: {"data": result.results["data"]} for name, result in found.items()},
        "skipped": dict(skipped),
        "judge": None if judge is None else judge.model,
        "arguments": {**arguments, **opened.arguments},
        **stamp(opened),
        "seconds": round(time.monotonic() - started, 2),
    }
    write_suite_report(results, found, folder / REPORT_NAME, title=f"regiontower evaluation: {opened.name}")
    write_json(folder / RESULTS_NAME, results)
    return GroundingResult(results, found, folder)


def _arguments(wanted: GroundingData, how: Opening) -> dict[str, Any]:
    return {
        "data": [str(item) for item in wanted.data],
        "data_root": None if (root := data_root(wanted.data_root)) is None else str(root),
        "image_root": None if wanted.image_root is None else str(wanted.image_root),
        "limit": wanted.limit,
        "dtype": how.dtype,
        "quant": how.quant,
    }


def _record_sources(item: str | Path, names: Sequence[str], wanted: GroundingData) -> list[Source]:
    if str(item) == SCENES:
        return _source(SCENES, evaluation_scenes(), "records", None, names, wanted.limit)
    path = Path(item)
    # Files of one data set are mostly called by their split: then the folder tells more.
    name = path.parent.absolute().name if path.stem in ("train", "val", "test", "records") else path.stem
    return _source(name, path, wanted.format, wanted.image_root, names, wanted.limit)


def _source(
    name: str, path: Path, format: str, image_root: str | Path | None, names: Sequence[str], limit: int | None
) -> list[Source]:
    asked = [task for task in names if task in RECORD_TASKS]
    if not asked:
        return []
    records = read_records(path, format=format, image_root=image_root, check_images=True)
    rows = {task: found for task, found in task_rows(records, asked, limit).items() if found}
    return [Source(name, rows, described(records, path, format))] if rows else []


def _named_apart(sources: Sequence[Source]) -> list[Source]:
    counts: dict[str, int] = {}
    named = []
    for source in sources:
        name = source.name.replace("/", "_") or "data"
        counts[name] = counts.get(name, 0) + 1
        named.append(Source(name if counts[name] == 1 else f"{name}-{counts[name]}", source.rows, source.data))
    return named
