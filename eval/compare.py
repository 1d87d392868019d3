"""Several models on the same questions: one table, differences with paired intervals, and what each answer costs.

Made for one language model with several towers. The first model is what the others are compared with.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console

from ..train_stages.atomic_write import write_atomically
from ..vision_towers.errors import UserError
from .cost import measure_cost
from .grounding_suite import (
    GroundingData,
    GroundingResult,
    Source,
    ask_suite,
    find_sources,
)
from .intervals import cluster_indices, draw_clusters
from .judge import Judge
from .opened import Opening, open_model
from .report import REPORT_NAME, metrics_of, shown_interval, shown_value, suite_facts, template
from .response_log import log_files
from .run import RESPONSES_NAME, RESULTS_NAME, check_processes, write_json
from .task_kinds import ALL_TASKS, LOWER_IS_BETTER, METRICS

if TYPE_CHECKING:
    from .opened import Model

COMPARISON_NAME = "comparison.json"
_RESAMPLES = 2000


@dataclass(frozen=True)
class Comparison:
    """results: what `OUT/comparison.json` holds. models: label -> its own suite."""

    results: dict[str, Any]
    models: dict[str, GroundingResult]


def paired_interval(
    first: tuple[Sequence[float], Sequence[float]],
    second: tuple[Sequence[float], Sequence[float]],
    clusters: Sequence[Hashable],
    *,
    seed: int = 0,
) -> tuple[float, float, float]:
    """How much larger the second ratio of sums is than the first, with its 95 % interval: (difference, low, high).

    Both models answered the same rows: each draw takes the same images for both, so what is hard for both cancels out.

    Args:
        first, second: what each row adds above and below the line, of each model.
        clusters: the image of each row.
    """
    count, member = cluster_indices(clusters)
    sums = [np.bincount(member, np.asarray(part, dtype=np.float64), count) for part in (*first, *second)]
    over, under, over2, under2 = sums
    difference = float(over2.sum() / under2.sum() - over.sum() / under.sum())
    draws = []
    for drawn in draw_clusters(count, _RESAMPLES, seed):
        below, below2 = drawn @ under, drawn @ under2
        some = (below > 0) & (below2 > 0)
        draws.append((drawn @ over2)[some] / below2[some] - (drawn @ over)[some] / below[some])
    low, high = np.percentile(np.concatenate(draws), [2.5, 97.5])
    return difference, float(low), float(high)


def differences(task: str, first: Sequence[dict], second: Sequence[dict]) -> dict[str, dict[str, Any]]:
    """Metric -> `{"difference", "ci95"}` of one task, the second model less the first, over the same rows."""
    found = {}
    for metric, field in METRICS[ALL_TASKS[task]].items():
        over, under = field if isinstance(field, tuple) else (field, None)
        parts = [
            ([float(row[over]) for row in rows], [1.0 if under is None else float(row[under]) for row in rows])
            for rows in (first, second)
        ]
        if first and all(sum(sizes) for _, sizes in parts):
            difference, low, high = paired_interval(parts[0], parts[1], [row["image_id"] for row in first])
            found[metric] = {"difference": difference, "ci95": [low, high]}
    return found


def compare(
    models: Sequence[Model],
    out: str | Path,
    wanted: GroundingData,
    *,
    how: Opening | None = None,
    judge: Judge | None = None,
) -> Comparison:
    """Run the suite `grounding` with each model, one after the other, on the very same rows; write `comparison.json`,
    `report.html`, and each model's own folder (`grounding_suite.run_grounding_suite`) into OUT.

    A comparison that was cut off (no `comparison.json`) is continued: only what is missing is asked. A finished one is
    done again from the start.

    Args:
        models, out, wanted, how, judge: as `grounding_suite.run_grounding_suite` takes them.

    Raises:
        UserError: fewer than two models, or what `find_sources` and `open_model` refuse.
    """
    if len(models) < 2:
        raise UserError("a comparison takes two models or more.")
    check_processes()
    how = how or Opening()
    sources, skipped = find_sources(wanted)
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    labels = _labels(models)
    finished = folder / COMPARISON_NAME
    if finished.is_file():
        finished.unlink()
        for label in labels:
            for file in log_files(folder / label / RESPONSES_NAME):
                file.unlink()
    found: dict[str, GroundingResult] = {}
    costs: dict[str, dict] = {}
    console = Console(stderr=True, quiet=not how.progress)
    for label, model in zip(labels, models, strict=True):
        console.print(f"model {label} ({len(found) + 1} of {len(models)})", style="bold", markup=False)
        part = folder / label
        part.mkdir(parents=True, exist_ok=True)
        (part / RESULTS_NAME).unlink(missing_ok=True)
        started = time.monotonic()
        opened = open_model(model, part / RESPONSES_NAME, how)
        found[label] = ask_suite(opened, part, sources, skipped, wanted, how, judge, started)
        costs[label] = measure_cost(opened, _all_rows(sources))
        del opened
        gc.collect()
    results = _results(found, costs)
    write_atomically(folder / REPORT_NAME, comparison_page(results, found))
    write_json(finished, results)
    return Comparison(results, found)


def _results(found: dict[str, GroundingResult], costs: dict[str, dict]) -> dict[str, Any]:
    base, *others = found
    return {
        "base": base,
        "models": {label: result.results for label, result in found.items()},
        "cost": costs,
        "differences": {
            label: {
                f"{source}/{task}": differences(task, rows, found[label].sources[source].samples[task])
                for source, part in found[base].sources.items()
                for task, rows in part.samples.items()
            }
            for label in others
        },
    }


def _labels(models: Sequence[Model]) -> list[str]:
    names = [Path(str(model)).name if isinstance(model, str | Path) else _plain(model) for model in models]
    return [f"{name}-{names[: i + 1].count(name)}" if names.count(name) > 1 else name for i, name in enumerate(names)]


def _plain(model: Any) -> str:
    text = type(model[0]).__name__ if isinstance(model, tuple) else str(model)
    return "".join(letter if letter.isalnum() or letter in "-._" else "_" for letter in text)[:60]


def _all_rows(sources: Sequence[Source]) -> list:
    return [row for source in sources for rows in source.rows.values() for row in rows]


_COSTS = {
    "parameters_m": ("parameters, millions", "{:.1f}"),
    "vision_parameters_m": ("of the vision tower, millions", "{:.1f}"),
    "weights_mb": ("weights, MB", "{:.0f}"),
    "image_tokens": ("image tokens a picture", "{:.0f}"),
    "answer_tokens": ("tokens an answer", "{:.1f}"),
    "first_token_s": ("seconds to the first token (median, batch 1)", "{:.3f}"),
    "answer_s": ("seconds an answer (median, batch 1)", "{:.3f}"),
    "peak_mb": ("peak memory while answering, MB", "{:.0f}"),
}


def comparison_page(results: dict[str, Any], found: dict[str, GroundingResult]) -> str:
    """The HTML page of a `Comparison`'s results and models."""
    labels = list(found)
    base = results["base"]
    rows = []
    for task, figures in found[base].tasks.items():
        every = [metrics_of(task.split("/", 1)[1], found[label].tasks[task]) for label in labels]
        for metric in max(every, key=len):  # of one whose boxes carry scores there are more
            cells = []
            for label in labels:
                own = found[label].tasks[task]
                change = None if label == base else results["differences"][label][task].get(metric)
                cells.append(
                    {
                        "value": shown_value(own, own.get(metric)),
                        "interval": shown_interval(own, metric),
                        "change": None if change is None else "{:+.3f}".format(change["difference"]),
                        "range": "" if change is None else "{:+.3f} to {:+.3f}".format(*change["ci95"]),
                        "sure": _verdict(metric, change),
                    }
                )
            name = f"{metric} (lower is better)" if metric in LOWER_IS_BETTER else metric
            title = f"{task.replace('regiontower_', '')} (n = {figures['n']})"
            rows.append({"task": title, "metric": name, "cells": cells})
    costs = [
        (caption, ["" if (value := results["cost"][label][name]) is None else form.format(value) for label in labels])
        for name, (caption, form) in _COSTS.items()
    ]
    facts = [(f"{label}: {name}", value) for label in labels for name, value in suite_facts(results["models"][label])]
    return template("comparison.html.jinja").render(labels=labels, base=base, rows=rows, costs=costs, facts=facts)


def _verdict(metric: str, change: dict[str, Any] | None) -> str:
    """ "better" or "worse" where the interval of the difference leaves out 0, else ""."""
    if change is None or change["ci95"][0] <= 0 <= change["ci95"][1]:
        return ""
    return "better" if (change["difference"] > 0) != (metric in LOWER_IS_BETTER) else "worse"
