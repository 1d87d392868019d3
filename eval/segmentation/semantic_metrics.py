"""How well the classes of pixels are told: intersection over union, over all pixels of all images.

torchmetrics' MeanIoU takes the mean over images and has no pixels to leave out, so it is not used here.
"""

from __future__ import annotations

import numpy as np

from .label_maps import VOID


def confusion(truth: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """`(C, C + 1)` int64: pixels by their true class (row) and their predicted class (column; the last one: `VOID`).

    truth, predicted: `(H, W)` of 0 .. C-1 or `VOID`. Pixels whose truth is `VOID` are left out.
    """
    known = truth != VOID
    columns = np.where(predicted == VOID, classes, predicted)[known]
    pairs = truth[known] * (classes + 1) + columns
    return np.bincount(pairs, minlength=classes * (classes + 1)).reshape(classes, classes + 1)


def pixel_counts(found: np.ndarray) -> np.ndarray:
    """`(C, 3)` of a confusion `(C, C + 1)`: pixels rightly of the class, wrongly of it, and missed."""
    right = found.diagonal()
    return np.stack([right, found[:, :-1].sum(0) - right, found.sum(1) - right], axis=-1)


def class_iou(counts: np.ndarray) -> np.ndarray:
    """`(..., C)` of `(..., C, 3)`: IoU = right / (right + wrong + missed); NaN for a class that is nowhere."""
    right, union = counts[..., 0].astype(float), counts.sum(-1)
    return np.divide(right, union, out=np.full(right.shape, np.nan), where=union > 0)


def mean_iou(counts: np.ndarray) -> np.ndarray:
    """mIoU `(...)` of `(..., C, 3)`: the mean over the classes that are in the truth or in an answer."""
    return mean_known(class_iou(counts))


def mean_known(values: np.ndarray) -> np.ndarray:
    """The mean `(...)` over the last axis of `(..., C)` without its NaNs; NaN where there is nothing else."""
    known = ~np.isnan(values)
    count = known.sum(-1)
    return np.divide(np.where(known, values, 0.0).sum(-1), count, out=np.full(count.shape, np.nan), where=count > 0)
