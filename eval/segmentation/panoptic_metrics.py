"""Panoptic quality (Kirillov et al., arXiv 1801.00868, section 4)::

    PQ = sum_{(p, g) in TP} IoU(p, g) / (|TP| + |FP| / 2 + |FN| / 2)  =  SQ RQ
    SQ = sum_{(p, g) in TP} IoU(p, g) / |TP|          RQ = |TP| / (|TP| + |FP| / 2 + |FN| / 2)

for each class over all images, and the mean over classes. A predicted segment p and a true one g of the same class with
IoU > 0.5 are a pair; there is at most one such partner.

torchmetrics' PanopticQuality is not used: it forgives a true segment that mostly got no answer, where the paper counts
a miss, and knows no crowds.
"""

from __future__ import annotations

import numpy as np

from .label_maps import PanopticMap
from .semantic_metrics import mean_known


def panoptic_counts(truth: PanopticMap, predicted: PanopticMap, classes: int) -> np.ndarray:
    """`(C, 4)` of one image: the sum of IoUs of pairs, TP, FP, FN.

    Void (section 4.2 of the paper): pixels that are void in the truth are no part of a prediction when its IoU is
    taken, and a prediction without a partner is not counted when more than half of it is void. Crowds are as in the
    authors' code: no crowd is to be found, and for predictions of its class it is void, too.
    """
    true_classes, found_classes = (np.array(given.classes, dtype=int) for given in (truth, predicted))
    crowd = np.array(truth.crowd, dtype=bool)
    count, answers = len(true_classes), len(found_classes)
    # VOID is -1: the last row and the last column.
    pairs = (truth.segment % (count + 1)) * (answers + 1) + predicted.segment % (answers + 1)
    overlap = np.bincount(pairs.ravel(), minlength=(count + 1) * (answers + 1)).reshape(count + 1, answers + 1)
    void, inside = overlap[-1, :-1], overlap[:-1, :-1]
    areas, found_areas = overlap[:-1].sum(1), overlap[:, :-1].sum(0)
    same = true_classes[:, None] == found_classes
    union = areas[:, None] + found_areas - inside - void
    iou = np.where(same & ~crowd[:, None], inside / np.maximum(union, 1), 0.0)
    matched = iou > 0.5
    ignored = void + np.where(same & crowd[:, None], inside, 0).sum(0)
    wrong = ~matched.any(0) & (found_areas > 0) & (ignored / np.maximum(found_areas, 1) <= 0.5)
    missed = ~matched.any(1) & ~crowd & (areas > 0)
    rows, _ = matched.nonzero()
    counts = np.zeros((classes, 4))
    counts[:, 0] = np.bincount(true_classes[rows], iou[matched], minlength=classes)
    for column, labels in ((1, true_classes[rows]), (2, found_classes[wrong]), (3, true_classes[missed])):
        counts[:, column] = np.bincount(labels, minlength=classes)
    return counts


def class_quality(counts: np.ndarray) -> np.ndarray:
    """`(..., C, 3)` of `(..., C, 4)`: PQ, SQ and RQ; NaN for a class without any segment, SQ 0 without any pair."""
    total, right, wrong, missed = np.moveaxis(counts, -1, 0)
    segments = right + wrong / 2 + missed / 2
    recognised = np.divide(right, segments, out=np.full(segments.shape, np.nan), where=segments > 0)
    shaped = np.divide(total, right, out=np.zeros(right.shape), where=right > 0)
    shaped = np.where(np.isnan(recognised), np.nan, shaped)
    return np.stack([shaped * recognised, shaped, recognised], axis=-1)


def panoptic_quality(counts: np.ndarray) -> np.ndarray:
    """`(..., 3)` of `(..., C, 4)`: the means of PQ, SQ and RQ over the classes that have a segment."""
    return mean_known(np.moveaxis(class_quality(counts), -1, -2))
