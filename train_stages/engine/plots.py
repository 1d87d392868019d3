"""The picture of a run: loss, smoothed loss, learning rates."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .run_log import EvalRow, LogRow

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PLOT_FILE = "loss.png"


def smoothed(values: Sequence[float], weight: float) -> list[float]:
    """Exponential mean that starts unbiased (the first value is itself)."""
    result, total, norm = [], 0.0, 0.0
    for value in values:
        total, norm = weight * total + (1 - weight) * value, weight * norm + (1 - weight)
        result.append(total / norm)
    return result


def plot_run(rows: Sequence[LogRow], evals: Sequence[EvalRow], path: Path, title: str) -> None:
    """Write a PNG of the loss (raw and smoothed) above the figures on held-out data, if there are any, and the learning
    rate of every trained part; no rows, no picture."""
    if not rows:
        return
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure  # not pyplot: no global state, no display

    heights = (4, 2, 1) if evals else (4, 1)
    height = sum(heights)
    figure = Figure(figsize=(8, height))
    FigureCanvasAgg(figure)
    # Margins are given: to find them, matplotlib would draw everything twice.
    figure.subplots_adjust(left=0.1, right=0.93, bottom=0.5 / height, top=1 - 0.35 / height, hspace=0.12)
    axes = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights)
    upper, lower = axes[0], axes[-1]
    if evals:
        _plot_evals(axes[1], evals)
    steps = [row.step for row in rows]
    losses = [row.loss for row in rows]
    upper.plot(steps, losses, color="0.75", linewidth=1, marker="." if len(rows) < 30 else "", label="loss")
    upper.plot(
        steps,
        smoothed(losses, min(0.95, max(0.5, 1 - 15 / len(losses)))),
        color="tab:blue",
        linewidth=2,
        label="smoothed",
    )
    upper.set_ylabel("loss")
    upper.set_title(title, fontsize=11)
    upper.grid(alpha=0.3)
    upper.legend(frameon=False)
    for part in rows[-1].lr:
        lower.plot(steps, [row.lr.get(part, 0.0) for row in rows], linewidth=1.5, label=part)
    lower.set_ylabel("lr")
    lower.set_xlabel("step")
    lower.yaxis.set_major_formatter("{x:g}")
    lower.grid(alpha=0.3)
    lower.legend(frameon=False, fontsize=8, ncols=4)
    beside = path.with_name(f".{path.name}.tmp")
    figure.savefig(beside, dpi=110, format="png")
    os.replace(beside, path)


def _plot_evals(axis: Axes, evals: Sequence[EvalRow]) -> None:
    """Shares on the left; losses and the like, which may be above 1, on the right."""
    names = dict.fromkeys(name for row in evals for name in row.figures)
    beside = None
    for number, name in enumerate(names):
        points = [(row.step, row.figures[name]) for row in evals if name in row.figures]
        target = axis
        if max(value for _, value in points) > 1:
            target = beside = beside or axis.twinx()
        steps, values = zip(*points, strict=True)
        target.plot(steps, values, color=f"C{number + 1}", marker="o", markersize=3, label=name)
    axis.set_ylabel("held out")
    axis.grid(alpha=0.3)
    drawn = [line for one in (axis, beside) if one is not None for line in one.get_lines()]
    axis.legend(handles=drawn, frameon=False, fontsize=8, ncols=4)
