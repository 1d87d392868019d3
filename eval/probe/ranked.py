"""Top-k figures of regions against classes: over all rows, or the mean of the classes' own shares."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..intervals import wilson_interval
from .classify import Share, share

TOP = (1, 5)
RESAMPLES = 2000
_CHUNK = 100  # draws in memory together


def ranks(similarity: Tensor, classes: np.ndarray) -> np.ndarray:
    """How many other classes are at least as near to each row as its own, `(N,)`; 0: its own is the nearest.

    similarity: `(N, C)`. classes: `(N,)`. A tie counts against the row, and so does a value that is no number: a model
    to which all classes are the same has recognised nothing.
    """
    own = similarity.gather(1, torch.from_numpy(classes)[:, None])
    return ((~(similarity < own)).sum(dim=1) - 1).numpy()


def micro_top(ranked: np.ndarray, images: np.ndarray) -> dict[str, Share]:
    """Shares of all rows, `{"top1", "top5"}`: right_k = |{i: rank_i < k}| / N. images: `(N,)`, for the interval."""
    return {f"top{k}": share(ranked < k, images) for k in TOP}


def class_mean_top(ranked: np.ndarray, images: np.ndarray, classes: np.ndarray) -> dict[str, Share]:
    """Means over the C classes that occur, `{"top1", "top5"}`: 1/C sum_c |{i in c: rank_i < k}| / |c|."""
    return {f"top{k}": class_mean(ranked < k, images, classes) for k in TOP}


def class_mean(right: np.ndarray, images: np.ndarray, classes: np.ndarray, seed: int = 0) -> Share:
    """The mean over classes of the share of `right (N,)`, whose interval draws whole images with replacement; a class
    that a draw does not hold is left out of that draw's mean. As in `mean_interval`, Wilson's interval over images
    where all rows are equal or of one image."""
    if not len(right):
        return Share(None, 0, None)
    _, image = np.unique(images, return_inverse=True)
    _, label = np.unique(classes, return_inverse=True)
    hits, total = np.zeros((2, image.max() + 1, label.max() + 1))
    np.add.at(hits, (image, label), right)
    np.add.at(total, (image, label), 1)
    value, count = float(np.mean(hits.sum(axis=0) / total.sum(axis=0))), len(total)
    if count == 1 or np.ptp(right.astype(float)) == 0:
        return Share(value, len(right), wilson_interval(value * count, count))
    rng, means = np.random.default_rng(seed), []
    for _ in range(RESAMPLES // _CHUNK):
        drawn = rng.multinomial(count, np.full(count, 1 / count), size=_CHUNK)
        held = drawn @ total
        means.append(np.nanmean(np.where(held > 0, drawn @ hits / np.maximum(held, 1), np.nan), axis=1))
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5])
    return Share(value, len(right), (float(low), float(high)))
