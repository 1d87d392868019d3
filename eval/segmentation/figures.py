"""The figures of a segmentation, from its counts over images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .interval import image_interval
from .label_maps import PanopticMap
from .panoptic_metrics import class_quality, panoptic_counts, panoptic_quality
from .semantic_metrics import class_iou, confusion, mean_iou, pixel_counts

Figure = Callable[[np.ndarray], np.ndarray]
Groups = dict[str, Sequence[int]]  # classes of which a figure is taken apart


def semantic_counts(truth: PanopticMap, predicted: PanopticMap, classes: int) -> np.ndarray:
    """`(C, 3)` of one image (`pixel_counts`)."""
    return pixel_counts(confusion(truth.semantic, predicted.semantic, classes))


def semantic_figures(counts: np.ndarray, groups: Groups) -> dict[str, dict[str, Any]]:
    """`miou`, `miou_GROUP`, `pixel_accuracy` and `miou_constant` of counts `(N, C, 3)`; what has nothing to count is
    left out."""
    figures: dict[str, dict[str, Any]] = {"miou": _figure(counts, mean_iou)}
    figures |= {f"miou_{name}": _figure(counts[:, list(numbers)], mean_iou) for name, numbers in groups.items()}
    figures["pixel_accuracy"] = _figure(counts, pixel_accuracy)
    constant = {"value": float(constant_miou(counts.sum(0))), "classes": figures["miou"]["classes"]}
    return _known(figures | {"miou_constant": constant})


def panoptic_figures(counts: np.ndarray, groups: Groups) -> dict[str, dict[str, Any]]:
    """`pq`, `sq`, `rq` and `pq_GROUP` of counts `(N, C, 4)`; what has nothing to count is left out."""
    figures = {
        name: _figure(counts, lambda given, place=place: panoptic_quality(given)[..., place])
        for place, name in enumerate(("pq", "sq", "rq"))
    }
    for name, numbers in groups.items():
        figures[f"pq_{name}"] = _figure(counts[:, list(numbers)], lambda given: panoptic_quality(given)[..., 0])
    return _known(figures)


def of_classes(counts: np.ndarray, names: Sequence[str]) -> dict[str, dict[str, float]]:
    """For each class that is anywhere: `iou` of counts `(N, C, 3)`, or `pq`, `sq` and `rq` of `(N, C, 4)`."""
    total = counts.sum(0)
    columns = ("iou",) if total.shape[-1] == 3 else ("pq", "sq", "rq")
    values = class_iou(total)[:, None] if len(columns) == 1 else class_quality(total)
    return {
        name: dict(zip(columns, row.tolist(), strict=True))
        for name, row in zip(names, values, strict=True)
        if not np.isnan(row).any()
    }


def pixel_accuracy(counts: np.ndarray) -> np.ndarray:
    """`(...)` of `(..., C, 3)`: the share of labelled pixels that are told rightly."""
    right, truth = counts[..., 0].sum(-1), (counts[..., 0] + counts[..., 2]).sum(-1)
    return np.divide(right, truth, out=np.full(right.shape, np.nan), where=truth > 0)


def constant_miou(counts: np.ndarray) -> float:
    """Of counts `(C, 3)`: the mIoU of the best answer that is one class everywhere.

    Of n_c pixels of class c, n in all, that is max_c n_c / n for one class, and 0 for the others that are there.
    """
    truth = counts[:, 0] + counts[:, 2]
    return truth.max() / (truth.sum() * (truth > 0).sum()) if truth.any() else np.nan


def _figure(counts: np.ndarray, figure: Figure) -> dict[str, Any]:
    total = counts.sum(0)
    value = float(figure(total))
    there = int((total.sum(-1) > 0).sum())
    interval = [] if np.isnan(value) else list(image_interval(counts, figure))
    return {"value": value, "classes": there, "ci95": interval}


def _known(figures: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {name: found for name, found in figures.items() if not np.isnan(found["value"])}


__all__ = ["of_classes", "panoptic_counts", "panoptic_figures", "semantic_counts", "semantic_figures"]
