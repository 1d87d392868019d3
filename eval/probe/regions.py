"""The regions of a record set as a tower reads them: what every probe starts from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...mllm.boxes import Boxes
from ...train_stages.pixels import PixelCache
from ...train_stages.records import Record
from ...train_stages.region_features import crop_features, region_features
from ...train_stages.region_labels import NO_CLASS
from ...vision_towers import RoiVisionModel, UmgClipVisionModel, UserError

BATCH = 64

Labels = Callable[[Record], Sequence[int]]
Reader = Callable[[PixelCache, Sequence[int], Sequence[Boxes], int, str], Iterator[Tensor]]


def _of(tower: PreTrainedModel) -> Reader:
    return lambda cache, rows, boxes, batch, progress: region_features(tower, cache, rows, boxes, batch, progress)


def _crops(tower: PreTrainedModel) -> Reader:
    return lambda cache, rows, boxes, batch, progress: crop_features(tower, cache, rows, boxes, batch, progress)


# Name -> how regions are read out of a tower: its own way; RoIAlign of its tokens; RoIAlign of the features on the
# value path of its last block (MaskCLIP, CLIPSelf); or one pass of the tower for every region, cut out and enlarged.
READOUTS: dict[str, Callable[[PreTrainedModel], Reader]] = {
    "own": _of,
    "roi": lambda tower: _of(RoiVisionModel.from_native(native(tower))),
    "value": lambda tower: _of(UmgClipVisionModel.from_native(native(tower), pooling="value")),
    "crops": _crops,
}


def reader(tower: PreTrainedModel, readout: str) -> Reader:
    """How `readout` (a key of `READOUTS`) reads regions out of `tower`. Raises UserError where that cannot be."""
    if readout not in READOUTS:
        raise UserError(f"there is no readout {readout!r}; choose among {', '.join(READOUTS)}.")
    return READOUTS[readout](tower)


def native(tower: PreTrainedModel) -> PreTrainedModel:
    """The native tower inside one of ours, or `tower` itself."""
    to_native = getattr(tower, "to_native", None)
    return tower if to_native is None else to_native()


@dataclass(frozen=True)
class ProbeRegions:
    """Regions that have a class: embeddings `(N, D)` float32, not normalised, classes `(N,)` and images `(N,)`, as rows
    of the cache."""

    features: np.ndarray
    classes: np.ndarray
    images: np.ndarray

    def __len__(self) -> int:
        return len(self.classes)


def labelled_regions(read: Reader, cache: PixelCache, labels: Labels, most: int | None = None) -> ProbeRegions:
    """The regions of `cache` whose class in `labels` is not `NO_CLASS`, images in order.

    most: stop after the image with which so many regions are reached; None: never.
    """
    rows: list[int] = []
    boxes: list[Boxes] = []
    classes: list[np.ndarray] = []
    for row, (record, frame) in enumerate(zip(cache.records, cache.frames, strict=True)):
        ids = np.asarray(labels(record), dtype=int)
        wanted = np.flatnonzero(ids != NO_CLASS)
        visible, kept = frame.to_input(Boxes([record.regions[i].box_xyxy for i in wanted]))
        if len(kept):
            rows.append(row)
            boxes.append(visible)
            classes.append(ids[wanted[kept]])
        if most is not None and sum(map(len, classes)) >= most:
            break
    if not rows:
        return ProbeRegions(np.zeros((0, 1), dtype=np.float32), np.zeros(0, dtype=int), np.zeros(0, dtype=int))
    features = torch.cat(list(read(cache, rows, boxes, BATCH, "features of regions")))
    images = np.repeat(rows, [len(of_image) for of_image in boxes])
    return ProbeRegions(features.cpu().numpy(), np.concatenate(classes), images)
