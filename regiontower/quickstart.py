"""The whole path once, on this machine: scenes, four stages of training, evaluation, a report."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from .vision_towers import UserError

# How the training minutes are shared.
SHARES = {"pretrain-lm": 0.25, "pretrain": 0.3, "align": 0.05, "instruct": 0.4}
# Smaller than the nano recipes: in so few minutes, more steps are worth more than more parameters.
SMALL_LM = {
    "model.hidden_size": 128,
    "model.layers": 4,
    "model.heads": 4,
    "model.kv_heads": 4,
    "model.intermediate_size": 320,
    "train.batch_size": 2,
    "train.optimizer": "adamw",
    "train.precision": "fp32",
    "train.compile": False,
    "lr": 3e-3,
}
# The recipes' large batches and bf16 are for hours on a processor with matrix units.
SMALL_STAGE = {"train.batch_size": 8, "train.optimizer": "adamw", "train.precision": "fp32", "train.compile": False}
SMALL_TOWER = {
    "model.size.hidden_size": 128,
    "model.size.layers": 4,
    "model.size.heads": 4,
    "model.size.intermediate_size": 512,
    # From nothing, on categories: there is no time for a first part and for clusters.
    "model.tower": None,
    "model.keep_heads": False,
    "data.object_labels": "category",
    "data.regions_per_image": 10,
    "train.batch_size": 16,
    "train.optimizer": "adamw",
    "train.precision": "fp32",
    "lr.tower": 1e-3,
    "lr.heads": 1e-3,
}
SCENES_PER_MINUTE = 400  # training scenes for each minute of training
MIN_SCENES = 64
EVAL_SCENES = 60
EVAL_LIMIT = 120  # rows a task
GALLERY = 12  # pictures in the report
OVERHEAD_MINUTES = 5  # everything but training, on two cores: for the first estimate of the time left


def quickstart(out: str | Path, minutes: float = 4.0) -> dict[str, Any]:
    """Train a small RegionLlava from nothing, measure it, and write `out/report/`.

    Stages that are finished in `out` are kept: a run that was interrupted goes on where it stopped.

    Args:
        out: folder for scenes, runs, evaluation and report.
        minutes: of training, all stages together.
    Returns:
        What `out/report/results.json` holds: `{"trained_now": {"grounding_acc50", "grounding_miou", "referring_em",
        "reading_em", "n"}, "seconds"}`; `n` is the smallest number of rows of a task, `seconds` the wall time.
    Raises:
        UserError: lmms-eval is missing, or `out` holds something else.
    """
    from .eval.baselines import trivial_baselines
    from .eval.report import write_report
    from .eval.run import evaluate
    from .eval.task_folder import require_lmms_eval
    from .train_stages.mllm_stage import AlignRecipe, InstructRecipe, align, instruct
    from .train_stages.pretrain import pretrain
    from .train_stages.pretrain_lm import LMRecipe, pretrain_lm
    from .train_stages.pretrain_recipe import PretrainRecipe
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
        values = {"train.minutes": round(minutes * SHARES[stage], 3), **values}
        # A path may hold what YAML reads otherwise (": ", " #"); a JSON string is a YAML string.
        return [f"{key}={json.dumps(str(v) if isinstance(v, Path) else v)}" for key, v in values.items()]

    # The pictures are decoded once for all stages that look at them.
    seen = {"data.records": train_records, "data.cache_dir": folder / "pixel_cache"}
    plan.begin("stage 0b: a language model learns the language of the questions")
    overrides = stage_overrides("pretrain-lm", **SMALL_LM, **{"data.records": train_records, "data.scenes": 0})
    pretrain_lm(load_recipe("lm-nano", LMRecipe, overrides), runs / "lm")

    plan.begin("stage 0: a tower learns regions (RICE)")
    overrides = stage_overrides(
        "pretrain", **seen, **SMALL_TOWER, **{"data.tokenizer": runs / "lm", "eval.records": eval_records}
    )
    pretrain(load_recipe("rice-nano", PretrainRecipe, overrides), runs / "tower")

    plan.begin("stage 1: projectors learn to connect the two")
    parents = {"model.tower": runs / "tower", "model.language_model": runs / "lm"}
    align(
        load_recipe("align-nano", AlignRecipe, stage_overrides("align", **seen, **parents, **SMALL_STAGE)),
        runs / "align",
    )

    plan.begin("stage 2: the model learns to answer")
    overrides = stage_overrides("instruct", **seen, **SMALL_STAGE, **{"model.mllm": runs / "align"})
    instruct(load_recipe("instruct-nano", InstructRecipe, overrides), runs / "instruct")

    plan.begin("evaluation through lmms-eval")
    result = evaluate(runs / "instruct", eval_records, out=folder / "eval", limit=EVAL_LIMIT)

    plan.begin("report")
    report = folder / "report"
    write_report(
        result,
        report,
        title=f"regiontower quickstart: {minutes:g} minutes of training",
        curves={stage: runs / name / "loss.png" for stage, name in RUN_NAMES.items()},
        beside=trivial_baselines(eval_records, train=train_records, limit=EVAL_LIMIT),
        gallery=GALLERY,
    )
    results = {"trained_now": headline(result.tasks), "seconds": plan.seconds()}
    (report / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return results


RUN_NAMES = {
    "stage 0b: language model": "lm",
    "stage 0: tower": "tower",
    "stage 1: align": "align",
    "stage 2: instruct": "instruct",
}


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
