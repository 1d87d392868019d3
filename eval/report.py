"""One HTML file, nothing beside it needed: figures, curves, and pictures with true and predicted boxes."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ..train_stages.images import open_image
from .confidence import plot_calibration
from .gallery import MODEL_COLOR, TRUE_COLOR, data_url, gallery, task_title
from .run import EvalResult
from .task_kinds import ALL_TASKS, HEADLINES, LOWER_IS_BETTER, MEANINGS, METRICS, SCORED_METRICS

__all__ = ["MODEL_COLOR", "TRUE_COLOR", "write_report", "write_suite_report"]

_BREAKDOWNS = {"by_box_size": "by the area of the box", "by_distractors": "by other things of the same category"}
REPORT_NAME = "report.html"  # of a suite


def write_report(
    result: EvalResult,
    out: str | Path,
    *,
    title: str = "regiontower evaluation",
    who: str = "model",
    curves: Mapping[str, str | Path] | None = None,
    beside: Mapping[str, Mapping[str, Mapping[str, Any]]] | None = None,
    gallery: int = 12,
) -> Path:
    """Write `OUT/index.html` and return its path.

    Args:
        result: of `run.evaluate`; its images must still be there.
        out: folder, made if needed.
        who: what the table calls the model.
        curves: caption -> image file of a loss plot.
        beside: task -> name -> figures to stand beside the model's: other models, `baselines.trivial_baselines`.
        gallery: at most so many pictures a task.

    Raises:
        ImageError: a picture that cannot be opened.
    """
    parts = [_part("", result, who, beside or {}, gallery)]
    return _write(Path(out) / "index.html", title, parts, facts(result.results), curves=curves)


def write_suite_report(
    results: Mapping[str, Any],
    sources: Mapping[str, EvalResult],
    path: Path,
    *,
    title: str = "regiontower evaluation",
    gallery: int = 9,
) -> Path:
    """Write the page of a suite to `path`: a part for each source. results: of the suite, for the facts at the end."""
    parts = [_part(name, result, "model", {}, gallery) for name, result in sources.items()]
    return _write(path, title, parts, suite_facts(results), overview=_overview(sources))


def write_builtin_report(result: EvalResult) -> Path:
    """Write `REPORT_NAME` beside the results of a suite of built-in tasks (`suite_run.evaluate_suite`)."""
    results = result.results
    figures = [
        {"task": name, "rows": [_figure("model", found, metric) for metric in found if metric not in ("n", "ci95")]}
        for name, found in result.tasks.items()
    ]
    part = {"source": "", "figures": figures, "several": False, "breakdowns": [], "calibration": None, "galleries": []}
    how = [
        ("model", results["model"]),
        ("weights (SHA-256)", results["weights_sha256"] or "not to be seen from here"),
        *(
            (f"data: {name}", ", ".join(f"{key} {value}" for key, value in found.items()))
            for name, found in results["data"].items()
        ),
        *_run_facts(results),
    ]
    return _write(result.out / REPORT_NAME, f"regiontower evaluation: suite {results['suite']}", [part], how)


def _write(
    path: Path,
    title: str,
    parts: Sequence[Mapping[str, Any]],
    how: Sequence[tuple[str, str]],
    *,
    curves: Mapping[str, str | Path] | None = None,
    overview: Mapping[str, Any] | None = None,
) -> Path:
    metrics = dict.fromkeys(row["metric"] for part in parts for task in part["figures"] for row in task["rows"])
    page = template("report.html.jinja").render(
        title=title,
        parts=parts,
        overview=overview,
        meanings=[(metric, MEANINGS[metric]) for metric in metrics if metric in MEANINGS],
        facts=how,
        curves=[{"name": name, "source": data_url(open_image(file), "PNG")} for name, file in (curves or {}).items()],
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return path


def template(name: str):
    """A page template of this folder: strict, and with everything escaped."""
    return Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined
    ).get_template(name)


def _part(
    source: str, result: EvalResult, who: str, beside: Mapping[str, Mapping[str, Mapping[str, Any]]], count: int
) -> dict[str, Any]:
    results = result.results
    return {
        "source": source,
        "figures": _figures(who, result.tasks, beside),
        "several": bool(beside),
        "breakdowns": _breakdowns(results.get("breakdown", {})),
        "calibration": _calibration(results.get("calibration", {})),
        "galleries": [gallery(name, rows, count) for name, rows in result.samples.items() if rows],
    }


def _figures(
    model: str, tasks: Mapping[str, Mapping], beside: Mapping[str, Mapping[str, Mapping]]
) -> list[dict[str, Any]]:
    """The figures of each task, those of others beside the model's."""
    return [
        {
            "task": task_title(name),
            "rows": [
                _figure(who.replace("_", " "), found, metric)
                for who, found in [(model, figures), *beside.get(name, {}).items()]
                for metric in metrics_of(name, found)
            ],
        }
        for name, figures in tasks.items()
    ]


def _figure(who: str, figures: Mapping[str, Any], metric: str) -> dict[str, Any]:
    return {
        "who": who,
        "n": figures["n"],
        "metric": metric,
        "better": "lower" if metric in LOWER_IS_BETTER else "",
        "value": shown_value(figures, figures[metric]),
        "interval": shown_interval(figures, metric),
    }


def _overview(sources: Mapping[str, EvalResult]) -> dict[str, Any]:
    """One figure for each task and source; an empty cell where the source has no such rows."""
    every = dict.fromkeys(task for result in sources.values() for task in result.tasks)
    rows = []
    for task in every:
        metric = HEADLINES[ALL_TASKS[task]]
        found = [result.tasks.get(task) for result in sources.values()]
        cells = [None if figures is None else _figure("model", figures, metric) for figures in found]
        rows.append({"task": task_title(task), "metric": metric, "cells": cells})
    return {"columns": list(sources), "rows": rows}


def metrics_of(task: str, figures: Mapping[str, Any]) -> list[str]:
    """The metrics that the figures of a task hold, in their order."""
    return [*METRICS[ALL_TASKS[task]], *(metric for metric in SCORED_METRICS if metric in figures)]


def shown_value(figures: Mapping[str, Any], value: float | None) -> str:
    """A figure in three digits, or why there is none."""
    if value is None:
        return "no rows" if not figures["n"] else "none to judge by"
    return f"{value:.3f}"


def shown_interval(figures: Mapping[str, Any], metric: str) -> str:
    """The 95 % interval of a figure, "" without one."""
    interval = (figures["ci95"] or {}).get(metric)
    return "{:.3f} to {:.3f}".format(*interval) if interval else ""


def _breakdowns(breakdown: Mapping[str, Mapping[str, Sequence[Mapping]]]) -> list[dict[str, Any]]:
    """One table for each way of grouping: a row a task, a column a group, a bar a share."""
    tables = []
    for way, caption in _BREAKDOWNS.items():
        rows = {task: groups[way] for task, groups in breakdown.items() if groups.get(way)}
        columns = list(dict.fromkeys(group["group"] for groups in rows.values() for group in groups))
        if columns:
            cells = {task: {group["group"]: group for group in groups} for task, groups in rows.items()}
            tables.append(
                {
                    "caption": caption,
                    "columns": _ordered(columns, way),
                    "rows": [{"task": task_title(task), "cells": found} for task, found in cells.items()],
                }
            )
    return tables


def _ordered(columns: Sequence[str], way: str) -> list[str]:
    from .breakdown import DISTRACTOR_NAMES, SIZE_NAMES

    order = SIZE_NAMES if way == "by_box_size" else DISTRACTOR_NAMES
    return sorted(columns, key=order.index)


def _calibration(bins: Mapping[str, Sequence[Mapping[str, float]]]) -> str | None:
    if not bins:
        return None
    with tempfile.TemporaryDirectory() as scratch:
        path = plot_calibration({task_title(name): parts for name, parts in bins.items()}, Path(scratch) / "plot.png")
        return data_url(open_image(path), "PNG")


def facts(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    """How one run was made, for the page's last table."""
    data = results["data"]
    return [
        *_model_facts(results),
        ("data", f"{data['path']}, {data['records']} images, {len(data['bad_records'])} bad records skipped"),
        ("data (SHA-256)", data["sha256"]),
        *_run_facts(results),
    ]


def suite_facts(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The same for a suite."""
    data = [
        (f"data: {name}", f"{found['data']['path']} (SHA-256 {str(found['data']['sha256'])[:16]}...)")
        for name, found in results["sources"].items()
    ]
    skipped = [(f"left out: {name}", reason) for name, reason in results["skipped"].items()]
    return [*_model_facts(results), *data, *skipped, *_run_facts(results)]


def _model_facts(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    boxes = f"{results['box_format']['model']}, scored as {results['box_format']['scored']}"
    convention = results.get("convention")
    return [
        ("model", results["model"]),
        ("weights (SHA-256)", results["weights_sha256"] or "not to be seen from here"),
        ("box format", boxes if convention is None else f"{boxes}, asked as {convention}"),
    ]


def _run_facts(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    arguments = results["arguments"]
    return [
        ("limit of rows a task", "none" if arguments["limit"] is None else str(arguments["limit"])),
        ("device", arguments["device"]),
        ("seconds", str(results["seconds"])),
        ("versions", ", ".join(f"{name} {version}" for name, version in results["versions"].items())),
    ]
