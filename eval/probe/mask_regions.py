"""Regions read by their masks: means of a tower's dense features over the patches that a mask covers."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from ...train_stages.mask_coverage import patch_coverage
from ...train_stages.normalise import PixelNorm
from ...train_stages.pixels import PixelCache
from ...train_stages.region_labels import NO_CLASS
from ...vision_towers import UmgClipVisionModel
from ...vision_towers.mask_pool import mask_mean
from .regions import CROPS, Labels, ProbeRegions, reading_tower


def dense_tower(tower: PreTrainedModel, readout: str) -> UmgClipVisionModel | None:
    """The tower whose dense features `readout` averages over boxes; None for a readout of another kind."""
    by = None if readout == CROPS else reading_tower(tower, readout)
    return by if isinstance(by, UmgClipVisionModel) else None


@torch.inference_mode()
def mask_regions(
    tower: UmgClipVisionModel, cache: PixelCache, labels: Labels, progress: str | None = "masks"
) -> ProbeRegions:
    """The regions of `cache` that have a mask and a class in `labels`, images in order.

    The embedding of one is sum_p m_p f_p / sum_p m_p, with m_p the share of patch p that the mask covers and f_p its
    dense feature (`mask_mean`): the space of the embeddings of boxes. A mask that covers nothing of the view is left
    out. progress: as in `labelled_regions`.
    """
    spec = tower.spec
    norm = PixelNorm(spec.image_mean, spec.image_std).to(tower.device)
    tower.eval()
    features: list[Tensor] = []
    classes: list[int] = []
    images: list[int] = []
    for row, record in enumerate(tqdm(cache.records, progress, unit="img", disable=progress is None)):
        wanted = [
            (region.mask, label)
            for region, label in zip(record.regions, labels(record), strict=True)
            if label != NO_CLASS and region.mask is not None
        ]
        if not wanted:
            continue
        shares = np.stack([patch_coverage(mask, cache.frames[row], spec.patch_size) for mask, _ in wanted])
        seen = np.flatnonzero(shares.any(axis=(1, 2)))
        # One image at a time: the masks of a large image weigh as much as its pixels.
        pixels = norm(torch.from_numpy(np.array(cache.pixels[row : row + 1])).to(tower.device))
        dense = tower(pixels, output_dense_features=True).dense_features
        features.append(mask_mean(dense, torch.from_numpy(shares[seen])[None].to(dense.device))[0].float().cpu())
        classes += [wanted[i][1] for i in seen.tolist()]
        images += [row] * len(seen)
    found = torch.cat(features).numpy() if features else np.zeros((0, 1), dtype=np.float32)
    return ProbeRegions(found, np.array(classes, dtype=int), np.array(images, dtype=int))
