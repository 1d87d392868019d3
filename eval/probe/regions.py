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

BATCH = 64  # images or crops of up to `BATCH_SIDE` px at a time; larger ones are fewer
BATCH_SIDE = 336

Labels = Callable[[Record], Sequence[int]]
Reader = Callable[[PixelCache, Sequence[int], Sequence[Boxes], int, str | None], Iterator[Tensor]]


# Name -> the tower that reads regions so: its own way; RoIAlign of its tokens; RoIAlign of the features on the value
# path of its last block (MaskCLIP, CLIPSelf), or of its pooling head with every patch as a query (FG-CLIP 2).
_TOWERS: dict[str, Callable[[PreTrainedModel], PreTrainedModel]] = {
    "own": lambda tower: tower,
    "roi": lambda tower: RoiVisionModel.from_native(native(tower)),
    "value": lambda tower: UmgClipVisionModel.from_native(native(tower), pooling="value"),
    "map": lambda tower: UmgClipVisionModel.from_native(native(tower), pooling="map"),
}
# And one pass of the tower for every region, cut out and enlarged.
CROPS = "crops"
READOUTS = (*_TOWERS, CROPS)


def reader(tower: PreTrainedModel, readout: str) -> Reader:
    """How `readout` (one of `READOUTS`) reads regions out of `tower`. Raises UserError where that cannot be."""
    if readout == CROPS:
        return lambda cache, rows, boxes, batch, progress: crop_features(tower, cache, rows, boxes, batch, progress)
    by = reading_tower(tower, readout)
    return lambda cache, rows, boxes, batch, progress: region_features(by, cache, rows, boxes, batch, progress)


def remembered(read: Reader) -> Reader:
    """The same, but every image is read once, with all of its regions: figures ask for the same ones again."""
    held: dict[tuple[int, int], dict[tuple[float, ...], Tensor]] = {}

    def again(
        cache: PixelCache, rows: Sequence[int], boxes: Sequence[Boxes], batch: int, progress: str | None
    ) -> Iterator[Tensor]:
        new = [row for row in dict.fromkeys(rows) if (id(cache), row) not in held]
        if new:
            every = [
                cache.frames[row].to_input(Boxes([region.box_xyxy for region in cache.records[row].regions]))[0]
                for row in new
            ]
            for row, of_image, embeds in zip(new, every, read(cache, new, every, batch, progress), strict=True):
                held[id(cache), row] = dict(zip(of_image, embeds, strict=True))
        for row, of_image in zip(rows, boxes, strict=True):
            yield torch.stack([held[id(cache), row][box] for box in of_image])

    return again


def reading_tower(tower: PreTrainedModel, readout: str) -> PreTrainedModel:
    """The tower, on the same weights, whose region embeddings `readout` gives; "crops" has none of its own. Raises
    UserError where that cannot be."""
    if readout not in _TOWERS:
        raise UserError(f"there is no readout {readout!r}; choose among {', '.join(READOUTS)}.")
    return _TOWERS[readout](tower)


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


def labelled_regions(
    read: Reader,
    cache: PixelCache,
    labels: Labels,
    most: int | None = None,
    progress: str | None = "features of regions",
) -> ProbeRegions:
    """The regions of `cache` whose class in `labels` is not `NO_CLASS`, images in order.

    most: stop after the image with which so many regions are reached; None: never. progress: what a progress bar says;
    None: no bar.
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
    batch = max(1, min(BATCH, BATCH * BATCH_SIDE**2 // cache.pixels.shape[-1] ** 2))
    features = torch.cat(list(read(cache, rows, boxes, batch, progress)))
    images = np.repeat(rows, [len(of_image) for of_image in boxes])
    return ProbeRegions(features.cpu().numpy(), np.concatenate(classes), images)
