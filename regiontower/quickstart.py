"""The main job once, on this machine: scenes, both stages of training, three evaluations, a report."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from .vision_towers import UserError

# How the training minutes are shared.
SHARES = {"align": 0.15, "instruct": 0.85}
# The recipes' large batches and bf16 are for hours on a processor with matrix units: in minutes, steps are worth more.
SMALL_STAGE = {"train.batch_size": 8, "train.precision": "fp32", "train.compile": False}
SCENES_PER_MINUTE = 400  # training scenes for each minute of training
MIN_SCENES = 64
EVAL_SCENES = 240
EVAL_LIMIT = 300  # rows a task
GALLERY = 12  # pictures a task in the report
OVERHEAD_MINUTES = 4  # everything but training, on two cores: for the first estimate of the time left

PARENTS = {"model.tower": "nano", "model.language_model": "nano-lm"}
# Row of the results -> packaged model. The control differs in how its tower was trained: image-text contrast (CLIP).
PACKAGED = {"nano": "nano", "control": "nano-clip"}
SHOWN = "nano"  # whose pictures are in the report
# Columns of the table, left first what shows that a tower is region-aware.
TABLE = {
    "referring": "referring_em",
    "reading": "reading_em",
    "grounding": "grounding_acc50",
    "mean IoU": "grounding_miou",
}
RUN_NAMES = {"stage 1: align": "align", "stage 2: instruct": "instruct"}


def quickstart(out: str | Path, minutes: float = 4.0, overwrite: bool = False) -> dict[str, Any]:
    """Train a RegionLlava from the packaged tower and language model, measure it beside the packaged models, report.

    Stages that are finished in `out` are kept: a run that was interrupted goes on where it stopped. Those of other
    `minutes` are refused, unless they are to be overwritten.

    Args:
        out: folder for scenes, runs, evaluations and report.
        minutes: of training, both stages together.
        overwrite: train finished stages again, and those of other minutes; an unfinished stage goes on. Scenes stay.
    Returns:
        What `out/report/results.json` holds: `{"nano", "control", "trained_now", "seconds"}`; each model is
        `{"grounding_acc50", "grounding_miou", "referring_em", "reading_em", "n"}`, `n` the smallest number of rows of a
        task; `seconds` is the wall time.
    Raises:
        UserError: lmms-eval is missing, or `out` holds something else or runs of other minutes.
    """
    from .eval.baselines import trivial_baselines
    from .eval.report import write_report
    from .eval.run import evaluate
    from .eval.task_folder import require_lmms_eval
    from .train_stages.mllm_stage import AlignRecipe, InstructRecipe, align, instruct
    from .train_stages.recipe import load_recipe
    from .train_stages.scenes import EVAL_SEED_START, write_scenes

    require_lmms_eval()  # now, and not after the training
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; give a folder.")
    plan = _Plan(minutes)
    runs = folder / "runs"

    plan.begin("scenes to learn from")
    count = max(MIN_SCENES, round(SCENES_PER_MINUTE * minutes))
    train_records = write_scenes(folder / "scenes" / "train", count, 0)
    plan.begin("scenes to be tested on")
    eval_records = write_scenes(folder / "scenes" / "eval", EVAL_SCENES, EVAL_SEED_START)

    def stage_overrides(stage: str, **values: Any) -> list[str]:
        values = {"train.minutes": round(minutes * SHARES[stage], 3), "train.steps": None, **SMALL_STAGE, **values}
        # The pictures are decoded once for both stages.
        values |= {"data.records": train_records, "data.cache_dir": folder / "pixel_cache"}
        # A path may hold what YAML reads otherwise (": ", " #"); a JSON string is a YAML string.
        return [f"{key}={json.dumps(str(v) if isinstance(v, Path) else v)}" for key, v in values.items()]

    plan.begin("stage 1: projectors learn to connect tower and language model")
    recipe = load_recipe("align-nano", AlignRecipe, stage_overrides("align", **PARENTS))
    align(recipe, runs / "align", overwrite=overwrite)
    plan.begin("stage 2: the model learns to answer")
    overrides = stage_overrides("instruct", **{"model.mllm": runs / "align"})
    instruct(load_recipe("instruct-nano", InstructRecipe, overrides), runs / "instruct", overwrite=overwrite)

    found = {}
    for name, model in {**PACKAGED, "trained_now": runs / "instruct"}.items():
        plan.begin(f"evaluation through lmms-eval: {name}")
        # fp32: the same arithmetic for all of them, and quick on every processor.
        found[name] = evaluate(model, eval_records, out=folder / "eval" / name, limit=EVAL_LIMIT, dtype="fp32")

    plan.begin("report")
    report = folder / "report"
    trivial = trivial_baselines(eval_records, train=train_records, limit=EVAL_LIMIT)
    others = [name for name in found if name != SHOWN]
    write_report(
        found[SHOWN],
        report,
        title=f"regiontower quickstart: the packaged models, and {minutes:g} minutes of training",
        who=SHOWN,
        curves={stage: runs / name / "loss.png" for stage, name in RUN_NAMES.items()},
        beside={task: {**{name: found[name].tasks[task] for name in others}, **trivial[task]} for task in trivial},
        gallery=GALLERY,
    )
    results = {**{name: headline(result.tasks) for name, result in found.items()}, "seconds": plan.seconds()}
    (report / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return results


def headline(tasks: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The figures of one model in one flat row."""
    grounding, referring, reading = (tasks[f"regiontower_{name}"] for name in ("grounding", "referring", "reading"))
    return {
        "grounding_acc50": grounding["acc50"],
        "grounding_miou": grounding["miou"],
        "referring_em": referring["em"],
        "reading_em": reading["em"],
        "n": min(task["n"] for task in (grounding, referring, reading)),
    }


def results_table(results: Mapping[str, Any]) -> str:
    """A line for each model of what `quickstart` returned, in per cent."""
    rows = [["per cent", *TABLE]]
    for name, figures in results.items():
        if name != "seconds":
            rows.append([name, *(f"{100 * figures[key]:.1f}" for key in TABLE.values())])
    first = max(len(row[0]) for row in rows)
    return "\n".join(row[0].ljust(first) + "".join(f"{value:>11}" for value in row[1:]) for row in rows)


class _Plan:
    """Says which of the eight steps begins and about how long all the rest takes."""

    STEPS = 8

    def __init__(self, minutes: float):
        self._console = Console(stderr=True)
        self._budget = 60 * (minutes + OVERHEAD_MINUTES)
        self._started, self._step = time.monotonic(), 0

    def begin(self, what: str) -> None:
        self._step += 1
        left = max(1, round((self._budget - self.seconds()) / 60))
        line = f"[{self._step}/{self.STEPS}] {what} (about {left} min left in all)"
        self._console.print(line, style="bold", markup=False, highlight=False, soft_wrap=True)

    def seconds(self) -> float:
        return round(time.monotonic() - self._started, 1)
