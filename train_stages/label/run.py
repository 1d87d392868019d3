"""Images -> shards of region records: a run that can be broken off anywhere and started again."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter
from tqdm import tqdm

from ...mllm.load import DTYPES, resolve_device
from ...vision_towers.errors import UserError
from ..atomic_write import write_atomically
from ..bad_records import BadRecord, name_bad, refuse_too_many_bad
from .labeller import Engine, source_key
from .one_run import only_run
from .plan import FOLDER as PLAN
from .plan import ImageSource, Plan, find_images, make_plan
from .processes import Job, label_here, label_in_processes
from .ray_cluster import label_on_ray
from .shard import DONE, FORMATS, PARTS, ROWS, commit_shard, finished_shards, shard_path

LABELS = "labels.json"
BAD = "bad_images.json"


@dataclass(frozen=True)
class RunConfig:
    """form: of the shards. per_shard: images in each, also those that are left out later. batch_size: images a call of
    the engine. processes: how many, each with models of its own. engine: where they run; "local" on this machine, "ray"
    on those of a Ray cluster. near_duplicates: leave out pictures whose
    256-bit hash differs from an earlier one's in at most so many bits. max_elongation: leave out images whose longer
    side is more than so many times the shorter (the papers do not say; lines and borders of web pages, from which
    PP-OCR makes pictures of gigabytes, and which some captioners refuse). dtype: auto, fp32, bf16 or fp16."""

    form: Literal["jsonl", "webdataset"] = "jsonl"
    per_shard: int = 1000
    batch_size: int = 8
    processes: int = 1
    engine: Literal["local", "ray"] = "local"
    near_duplicates: int | None = None
    max_elongation: float = 40.0
    device: str = "auto"
    dtype: str = "auto"
    overwrite: bool = False
    progress: bool = True


@dataclass(frozen=True)
class LabelResult:
    """What a finished run holds. shards: the files. images: all that were looked at; passed_over: those left out, by
    reason; bad: unreadable ones. source: key of this run in `labels.json`. seconds, labelled_now: of this call
    alone."""

    folder: Path
    source: str
    shards: list[Path]
    images: int
    records: int
    regions: int
    passed_over: dict[str, int]
    bad: list[BadRecord]
    seconds: float
    labelled_now: int

    def report(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "out": str(self.folder),
            "shards": len(self.shards),
            "images": self.images,
            "records": self.records,
            "regions": self.regions,
            "passed_over": self.passed_over,
            "bad": len(self.bad),
            "bad_named": name_bad(self.bad) if self.bad else None,
            "bad_listed": str(self.folder / BAD) if self.bad else None,
            "seconds": round(self.seconds, 2),
            "images_per_second": round(self.labelled_now / self.seconds, 2) if self.labelled_now else None,
        }

    def summary(self) -> str:
        """To read."""
        reasons = ", ".join(f"{reason} ({count})" for reason, count in self.passed_over.items())
        left = f"; left out: {reasons}" if reasons else ""
        bad = f"; {len(self.bad)} bad: {name_bad(self.bad)}" if self.bad else ""
        return (
            f"{self.records} of {self.images} images with {self.regions} regions in {len(self.shards)} shards in "
            f"{self.folder}{left}{bad}"
        )


def label_images(
    engine: Engine, settings: Any, source: ImageSource, out: str | Path, run: RunConfig | None = None
) -> LabelResult:
    """Label every image of `source` and write shards of region records into the folder `out`.

    A run that was broken off, however, goes on where it stood: finished shards are kept, each appears whole or not at
    all. `labels.json` beside the shards says what the regions' `source` stands for, `bad_images.json` names what cannot
    be read. With `processes` above 1, or on Ray, the engine must be one that `find_engine` knows.

    Args:
        settings: of the engine, an `engine.config`.
    Raises:
        UserError: `out` holds a run of other settings or images, or another process is writing into it; more than
            max(5, 1 %) of the images are unreadable; a model cannot be opened.
    """
    with only_run(Path(out)):
        return _label_images(engine, settings, source, Path(out), run or RunConfig())


def _label_images(engine: Engine, settings: Any, source: ImageSource, folder: Path, run: RunConfig) -> LabelResult:
    started = time.perf_counter()
    if run.dtype not in ("auto", *DTYPES):
        raise UserError(f"dtype must be auto, {', '.join(DTYPES)}; got {run.dtype!r}.")
    plain = TypeAdapter(engine.config).dump_python(settings, mode="json")
    # All that a user may have got wrong comes before anything is removed.
    facts = {
        "engine": engine.name,
        "writes": list(engine.writes),
        "settings": plain,
        "dtype": run.dtype,
        **engine.facts(settings),
    }
    choices = {"near_duplicates": run.near_duplicates, "max_elongation": run.max_elongation}
    wanted = {**facts, **choices, "form": run.form, "per_shard": run.per_shard}
    device, found = resolve_device(run.device), find_images(source)
    _claim(folder, run.overwrite)
    plan = make_plan(found, folder, wanted, per_shard=run.per_shard, threads=run.processes, **choices)
    key = source_key(engine.name, facts)
    _write_labels(folder, source, key, facts)
    job = Job(engine.name, plain, os.path.abspath(folder), run.form, run.batch_size, device, run.dtype, -1, key)
    done = finished_shards(folder)
    before = sum(result.images for result in done)
    _label(engine, job, plan, source.path, run)
    result = _result(folder, key, run.form, plan, time.perf_counter() - started, before)
    if result.bad:
        listed = [{"image": record.line, "reason": record.reason} for record in result.bad]
        write_atomically(folder / BAD, json.dumps(listed, indent=2, ensure_ascii=False) + "\n")
    return result


def remove_labels(folder: Path) -> None:
    """Remove what a run wrote; whatever else lies in the folder stays."""
    for form in FORMATS:
        for path in folder.glob(shard_path(folder, 0, form).name.replace("00000", "[0-9]" * 5)):
            path.unlink()
    for name in (LABELS, BAD):
        (folder / name).unlink(missing_ok=True)
    for name in (DONE, PARTS, ROWS, f".{PLAN}.part", PLAN):  # the plan last: by it the rest is known as ours
        shutil.rmtree(folder / name, ignore_errors=True)


def _claim(folder: Path, overwrite: bool) -> None:
    ours = (folder / PLAN).is_dir()
    if overwrite and ours:
        remove_labels(folder)
    elif not ours and any(path for form in FORMATS.values() for path in folder.glob(f"*.{form}")):
        raise UserError(f"{folder} holds records of another origin; choose a new folder.")
    shutil.rmtree(folder / PARTS, ignore_errors=True)


def _write_labels(folder: Path, source: ImageSource, key: str, facts: dict[str, Any]) -> None:
    """What regions already carried keeps its meaning: entries beside the records that are read are taken over."""
    beside = source.path.parent / LABELS
    known = json.loads(beside.read_text("utf-8")) if source.format is not None and beside.is_file() else {}
    write_atomically(folder / LABELS, json.dumps({**known, key: facts}, indent=2, ensure_ascii=False) + "\n")


def _label(engine: Engine, job: Job, plan: Plan, source: Path, run: RunConfig) -> None:
    folder = plan.folder
    done = finished_shards(folder)
    bad = [*plan.bad, *(record for result in done for record in result.bad)]
    open_ones = sorted(set(range(plan.shards)) - {result.index for result in done})
    with tqdm(
        total=plan.images,
        initial=sum(result.images for result in done),
        desc=engine.name,
        unit="img",
        mininterval=0.5,
        disable=not run.progress,
    ) as bar:

        def on_images(count: int) -> None:
            bar.update(count)

        if run.engine == "ray":
            parts = label_on_ray(job, open_ones, run.processes, on_images)
        elif run.processes == 1:
            parts = label_here(job, engine, open_ones, on_images)
        else:
            parts = label_in_processes(job, open_ones, run.processes, on_images)
        for part in parts:
            bad += part.result.bad
            refuse_too_many_bad(source, bad, plan.total)
            commit_shard(folder, run.form, part)
    shutil.rmtree(folder / PARTS, ignore_errors=True)


def _result(folder: Path, source: str, form: str, plan: Plan, seconds: float, before: int) -> LabelResult:
    done = finished_shards(folder)
    passed_over = Counter(plan.passed_over)
    for result in done:
        passed_over.update(result.passed_over)
    return LabelResult(
        folder,
        source,
        _shards(folder, form, [result.index for result in done if result.records]),
        plan.total,
        sum(result.records for result in done),
        sum(result.regions for result in done),
        dict(passed_over),
        [*plan.bad, *(record for result in done for record in result.bad)],
        seconds,
        sum(result.images for result in done) - before,
    )


def _shards(folder: Path, form: str, indices: Sequence[int]) -> list[Path]:
    return [shard_path(folder, index, form) for index in indices]
