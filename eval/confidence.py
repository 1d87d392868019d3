"""What the scores of boxes are worth: average precision, and whether 80 % sure means right 8 times in 10.

A box's score is the mean probability of the tokens that wrote it (`mllm.boxes.score_boxes`).
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..mllm.boxes import Boxes
from .box_sets import FOUND_IOU
from .intervals import cluster_indices, draw_clusters, wilson_interval

BINS = 10
_RESAMPLES = 500  # of the average precision, which costs more than a mean
_LEAST = 10  # boxes in a group


@dataclass(frozen=True)
class ScoredBoxes:
    """All boxes of a task's answers, the surest first.

    Attributes:
        scores: `(N,)` of the boxes.
        hits: `(N,)` bool: the box found a true one that no surer box of the same answer had found.
        rows: `(N,)` the row (position in the task) of each box.
        true: `(rows,)` number of true boxes of each row.
        clusters: the image of each row.
    """

    scores: np.ndarray
    hits: np.ndarray
    rows: np.ndarray
    true: np.ndarray
    clusters: Sequence[Hashable]


def scored_boxes(samples: Sequence[Mapping]) -> ScoredBoxes | None:
    """The boxes of the samples of one task, or None where no box carries a score.

    Each sample has `boxes` (of its answer, all of them), `box_scores` (or None), `true_boxes` and `image_id`. In each
    answer the surest box takes the best true box that is left, as COCO's evaluation does.
    """
    scores: list[float] = []
    hits: list[bool] = []
    rows: list[int] = []
    for position, sample in enumerate(samples):
        if not sample["box_scores"]:
            continue
        order = np.argsort(sample["box_scores"], kind="stable")[::-1]
        overlaps = Boxes([sample["boxes"][index] for index in order]).iou(Boxes(list(sample["true_boxes"])))
        for rank, index in enumerate(order):
            best = int(overlaps[rank].argmax()) if overlaps.shape[1] else -1
            hit = best >= 0 and bool(overlaps[rank, best] >= FOUND_IOU)
            if hit:
                overlaps[:, best] = 0.0
            scores.append(float(sample["box_scores"][index]))
            hits.append(hit)
            rows.append(position)
    if not scores:
        return None
    ranked = np.argsort(-np.asarray(scores), kind="stable")
    true = np.asarray([len(sample["true_boxes"]) for sample in samples])
    clusters = [sample["image_id"] for sample in samples]
    return ScoredBoxes(np.asarray(scores)[ranked], np.asarray(hits)[ranked], np.asarray(rows)[ranked], true, clusters)


def average_precision(found: ScoredBoxes, row_weights: np.ndarray | None = None) -> float:
    """Area under precision over recall at an IoU of 0.5, all boxes of all rows ranked by score; precision is made
    monotonic first (the all-points rule of PASCAL VOC 2010). Rows count as often as `row_weights` says."""
    weights = np.ones(len(found.true)) if row_weights is None else np.asarray(row_weights, dtype=np.float64)
    total = float(weights @ found.true)
    if total == 0:
        return 0.0
    each = weights[found.rows]
    hits, given = np.cumsum(each * found.hits), np.cumsum(each)
    precision = np.divide(hits, given, out=np.zeros_like(hits), where=given > 0)
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    recall = np.concatenate([[0.0], hits / total])
    return float(np.sum(np.diff(recall) * precision))


def average_precision_interval(found: ScoredBoxes, seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval over whole images drawn with replacement; where that sees no spread, Wilson's with the
    number of images."""
    count, member = cluster_indices(found.clusters)
    draws = [average_precision(found, row[member]) for part in draw_clusters(count, _RESAMPLES, seed) for row in part]
    if np.ptp(draws) == 0.0:
        return wilson_interval(draws[0] * count, count)
    low, high = np.percentile(draws, [2.5, 97.5])
    return float(low), float(high)


def reliability(found: ScoredBoxes) -> list[dict[str, float]]:
    """Boxes in at most `BINS` groups of (nearly) equal size by score, rising: `{"score", "share_right", "n"}`, the mean
    score, the share of right boxes and their number."""
    order = found.scores.argsort(kind="stable")
    parts = np.array_split(order, min(BINS, max(1, len(order) // _LEAST)))
    return [
        {"score": float(found.scores[part].mean()), "share_right": float(found.hits[part].mean()), "n": len(part)}
        for part in parts
    ]


def expected_calibration_error(bins: Sequence[Mapping[str, float]]) -> float:
    """Mean distance between a group's score and its share of right boxes, each group weighted by its size."""
    total = sum(part["n"] for part in bins)
    return sum(part["n"] * abs(part["score"] - part["share_right"]) for part in bins) / total


def confidence_figures(samples: Sequence[Mapping]) -> tuple[dict, dict, list[dict[str, float]]]:
    """`({"ap50", "ece"}, their intervals, the groups of `reliability`)`; all empty where no box carries a score."""
    found = scored_boxes(samples)
    if found is None:
        return {}, {}, []
    bins = reliability(found)
    figures = {"ap50": average_precision(found), "ece": expected_calibration_error(bins)}
    return figures, {"ap50": list(average_precision_interval(found))}, bins


def plot_calibration(bins: Mapping[str, Sequence[Mapping[str, float]]], path: Path) -> Path:
    """A reliability diagram, one line a task. bins: what the line is called -> its groups."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.0, 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="#9aa4ad", linestyle="--", linewidth=1, label="as sure as right")
    for name, parts in bins.items():
        axes.plot([part["score"] for part in parts], [part["share_right"] for part in parts], marker="o", label=name)
    axes.set(xlim=(0, 1.02), ylim=(-0.02, 1.02), xlabel="score of the box (mean token probability)")
    axes.set_ylabel(f"share with an IoU of at least {FOUND_IOU}")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.25)
    figure.savefig(path, dpi=110)
    return path
