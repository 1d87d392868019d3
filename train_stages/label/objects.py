"""RICE's object regions (arXiv 2507.20025, Sec. 3.1): boxes of SAM, a feature for each, k-means, and the nearest centre
as the label. This file is the first half, image by image; `object_clusters` is the second.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from ...mllm.boxes import Boxes, mean_colour
from ...vision_towers import describe_tower, load_tower
from ...vision_towers.errors import UserError
from ..pixels import PixelCache, to_pixels
from ..records import Record, Region
from ..region_features import crop_features, region_features
from .labeller import Engine, Labelled, PassedOver, Workplace, model_facts
from .proposals import Proposer, mask_proposals, need_mask_model, record_proposals, segment_proposals
from .region_filters import min_edge, suppress

CROP_SOURCE_SIDE = 640  # pixels of the square that crops are cut from, where the settings do not say


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class ObjectsConfig:
    """From the paper: image_min_edge and box_min_edge (pixels). The rest is ours.

    tower: whose features are clustered (the paper: CLIP's). proposals: "masks" of `mask_model`, the "record"'s own
    regions, or "segments", which need no weights. nms_iou: of two boxes that overlap more the better one stays.
    max_regions: the best of each image. min_mask_iou, min_mask_stability, points_per_side: SAM's. feature: see
    `ClusterConfig`. side: pixels of the letterboxed square; crops are cut from 640, "region" read at the tower's own.
    """

    tower: str
    proposals: Literal["masks", "record", "segments"] = "masks"
    mask_model: str | None = None
    image_min_edge: int = 336
    box_min_edge: float = 128.0
    nms_iou: float = 0.7
    max_regions: int = 32
    min_mask_iou: float = 0.88
    min_mask_stability: float = 0.95
    points_per_side: int = 32
    points_per_batch: int = 64
    feature: Literal["masked_crop", "crop", "region"] = "masked_crop"
    side: int | None = None
    feature_batch: int = 64


class ObjectsLabeller:
    """Adds candidate regions to each record; the rows are their features, NaN for regions that are no candidates."""

    def __init__(self, config: ObjectsConfig, workplace: Workplace):
        self._config, self._source = config, workplace.source
        self._propose = _open_proposer(config, workplace)
        self._tower = load_tower(config.tower, dtype=workplace.dtype).to(workplace.device)  # pyright: ignore
        spec = describe_tower(self._tower.config)
        self._fill = mean_colour(spec.image_mean)
        self._side = config.side or (spec.image_size if config.feature == "region" else CROP_SOURCE_SIDE)
        self._width = spec.region_dim if config.feature == "region" else spec.hidden_size

    def label(self, images: Sequence[Image.Image], records: Sequence[Record]) -> list[Labelled | PassedOver]:
        """See `Labeller`."""
        results: list[Labelled | PassedOver] = []
        cut: list[tuple[int, Image.Image, list[Region], list[int]]] = []
        for image, record in zip(images, records, strict=True):
            if min(image.size) < self._config.image_min_edge:
                results.append(PassedOver("image too small"))
                continue
            regions, candidates = self._candidates(image, record)
            if not candidates:
                results.append(PassedOver("no region"))
                continue
            cut.append((len(results), image, regions, candidates))
            results.append(Labelled(record.model_copy(update={"regions": regions})))
        for (place, _, regions, candidates), rows in zip(cut, self._features(cut), strict=True):
            labelled = results[place]
            assert isinstance(labelled, Labelled)
            every = np.full((len(regions), self._width), np.nan, dtype=np.float16)
            every[candidates] = rows
            results[place] = Labelled(labelled.record, every)
        return results

    def _candidates(self, image: Image.Image, record: Record) -> tuple[list[Region], list[int]]:
        """All regions that the record is to have, and which of them get a cluster."""
        config = self._config
        found = [region for region in self._propose(image, record) if min_edge(region.box_xyxy) >= config.box_min_edge]
        scores = [1.0 if region.score is None else region.score for region in found]
        kept = suppress([region.box_xyxy for region in found], scores, None, config.nms_iou)[: config.max_regions]
        best = [found[index] for index in kept]
        if config.proposals == "record":
            chosen = {id(region) for region in best}
            return list(record.regions), [i for i, region in enumerate(record.regions) if id(region) in chosen]
        new = [region.model_copy(update={"source": self._source}) for region in best]
        return [*record.regions, *new], list(range(len(record.regions), len(record.regions) + len(new)))

    def _features(self, cut: Sequence[tuple[int, Image.Image, list[Region], list[int]]]) -> list[np.ndarray]:
        """For each image `(C, D)`, one row for a candidate."""
        if not cut:
            return []
        shown = [to_pixels(image, self._side, self._fill) for _, image, _, _ in cut]
        records = [Record(image="-", width=image.width, height=image.height) for _, image, _, _ in cut]
        cache = PixelCache(np.stack([pixels for pixels, _ in shown]), [frame for _, frame in shown], records, [])
        boxes, kept, masks = [], [], []
        for frame, (_, _, regions, candidates) in zip(cache.frames, cut, strict=True):
            visible, indices = frame.to_input(Boxes([regions[index].box_xyxy for index in candidates]))
            boxes.append(visible)
            kept.append(indices)
            masks.append([regions[candidates[index]].mask for index in indices])
        if self._config.feature == "region":
            found = region_features(self._tower, cache, range(len(cut)), boxes, self._config.feature_batch)
        else:
            shown_masks = masks if self._config.feature == "masked_crop" else None
            found = crop_features(
                self._tower, cache, range(len(cut)), boxes, self._config.feature_batch, masks=shown_masks
            )
        rows = []
        for features, indices, (_, _, _, candidates) in zip(found, kept, cut, strict=True):
            row = np.full((len(candidates), self._width), np.nan, dtype=np.float16)
            row[indices] = torch.nn.functional.normalize(features, dim=-1).cpu().numpy()
            rows.append(row)
        return rows


def _open_proposer(config: ObjectsConfig, workplace: Workplace) -> Proposer:
    if config.proposals == "record":
        return record_proposals
    if config.proposals == "segments":
        return segment_proposals
    return mask_proposals(
        need_mask_model(config.mask_model),
        workplace,
        min_iou=config.min_mask_iou,
        min_stability=config.min_mask_stability,
        points_per_side=config.points_per_side,
        points_per_batch=config.points_per_batch,
    )


def _facts(config: ObjectsConfig) -> dict[str, Any]:
    models = {"tower": model_facts(config.tower)}
    if config.proposals == "masks":
        models["masks"] = model_facts(need_mask_model(config.mask_model))
    elif config.mask_model is not None:
        raise UserError(f"--mask-model belongs to --proposals masks, not to {config.proposals}.")
    return {"models": models}


ENGINE = Engine(
    "rice-objects", ObjectsConfig, ObjectsLabeller, _facts, ("regions.mask", "regions.score", "regions.cluster")
)
