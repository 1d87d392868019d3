"""Which images and boxes are good enough to be labelled."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torchvision.ops import batched_nms

Box = tuple[float, float, float, float]


def clip_box(box: Sequence[float], size: tuple[int, int]) -> Box | None:
    """The part of an xyxy box inside an image of `size` = (width, height), in hundredths of a pixel; None when nothing
    of it is."""
    width, height = size
    x0, y0, x1, y1 = (round(float(edge), 2) for edge in box)
    clipped = (max(x0, 0.0), max(y0, 0.0), min(x1, float(width)), min(y1, float(height)))
    return clipped if clipped[0] < clipped[2] and clipped[1] < clipped[3] else None


def pixel_box(box: Sequence[float]) -> tuple[int, int, int, int]:
    """The whole pixels that an xyxy box touches, to cut it out by: at least one each way, however thin it is."""
    x0, y0, x1, y1 = box
    return math.floor(x0), math.floor(y0), math.ceil(x1), math.ceil(y1)


def min_edge(box: Sequence[float]) -> float:
    """The shorter side of an xyxy box, in pixels."""
    return min(box[2] - box[0], box[3] - box[1])


def area(box: Sequence[float]) -> float:
    """Of an xyxy box, in square pixels."""
    return (box[2] - box[0]) * (box[3] - box[1])


def is_longish(width: float, height: float, longest: float) -> bool:
    """Whether one side is more than `longest` times the other."""
    return max(width, height) > longest * min(width, height)


def suppress(boxes: Sequence[Box], scores: Sequence[float], groups: Sequence[int] | None, iou: float) -> list[int]:
    """Non-maximum suppression, within each group: the indices that stay, best first. groups: None for one of all."""
    if not boxes:
        return []
    of = np.zeros(len(boxes), dtype=np.int64) if groups is None else np.asarray(groups)
    kept = batched_nms(
        torch.tensor(boxes, dtype=torch.float32),
        torch.tensor(scores, dtype=torch.float32),
        torch.from_numpy(of),
        iou,
    )
    return kept.tolist()
