"""Boxes and masks as CLIPSelf's code reads them: means over patches whose embeddings have length 1.

    v = RoIAlign(f / |f|, box)        v = sum_p m_p f_p / |f_p| / sum_p m_p

with f the dense features in the space of the texts, and m_p 1 where the mask covers any of patch p (`encode_dense` and
`mask_pool` of eva_vit_model.py, `COCOPanopticDataset` of data.py, github.com/wusize/CLIPSelf). Our own readouts average
features as they are, by the covered shares.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ...mllm.boxes import Boxes
from ...train_stages.mask_coverage import patch_coverage
from ...train_stages.normalise import PixelNorm
from ...train_stages.pixels import PixelCache
from ...train_stages.records import Region
from ...train_stages.region_labels import NO_CLASS
from ...vision_towers import UmgClipVisionModel
from ...vision_towers.mask_pool import mask_mean
from ...vision_towers.roi_pool import roi_mean
from .regions import Labels, ProbeRegions


@torch.inference_mode()
def by_unit_tokens(
    tower: UmgClipVisionModel, project: Callable[[Tensor], Tensor], cache: PixelCache, wanted: Mapping[str, Labels]
) -> dict[str, ProbeRegions]:
    """The regions of `cache`, in the space of the texts: for each name of `wanted` those that have a class in its
    labels, read by their masks where the name ends in "masks" (those without one are left out), else by their boxes.

    project: dense features `(..., D)` to the space `(..., J)`.
    """
    spec = tower.spec
    norm = PixelNorm(spec.image_mean, spec.image_std).to(tower.device)
    tower.eval()
    found: dict[str, list[tuple[Tensor, list[int], int]]] = {name: [] for name in wanted}
    for row, record in enumerate(cache.records):
        pixels = norm(torch.from_numpy(np.array(cache.pixels[row : row + 1])).to(tower.device))
        tokens = F.normalize(project(tower(pixels, output_dense_features=True).dense_features).float(), dim=-1)
        for name, labels in wanted.items():
            pairs = [
                (region, label)
                for region, label in zip(record.regions, labels(record), strict=True)
                if label != NO_CLASS
            ]
            read = _masks if name.endswith("masks") else _boxes
            vectors, kept = read(tokens, [region for region, _ in pairs], cache, row, spec.patch_size)
            found[name].append((vectors.cpu(), [pairs[place][1] for place in kept], row))
    return {name: _together(parts) for name, parts in found.items()}


def _boxes(
    tokens: Tensor, regions: list[Region], cache: PixelCache, row: int, patch_size: int
) -> tuple[Tensor, list[int]]:
    """`(n, J)`, and which of `regions` they are: those that the view shows."""
    boxes, kept = cache.frames[row].to_input(Boxes([region.box_xyxy for region in regions]))
    grid = (tokens.shape[1], tokens.shape[2])
    return roi_mean(tokens.flatten(1, 2), grid, boxes.tensor()[None].to(tokens.device), patch_size, 1)[0], list(kept)


def _masks(
    tokens: Tensor, regions: list[Region], cache: PixelCache, row: int, patch_size: int
) -> tuple[Tensor, list[int]]:
    shares = {
        place: patch_coverage(region.mask, cache.frames[row], patch_size)
        for place, region in enumerate(regions)
        if region.mask is not None
    }
    kept = [place for place, share in shares.items() if share.any()]
    if not kept:
        return tokens.new_zeros(0, tokens.shape[-1]), []
    covered = torch.from_numpy(np.stack([shares[place] > 0 for place in kept])).to(tokens)
    return mask_mean(tokens, covered[None])[0], kept


def _together(parts: list[tuple[Tensor, list[int], int]]) -> ProbeRegions:
    images = np.repeat([row for *_, row in parts], [len(classes) for _, classes, _ in parts])
    classes = np.array([label for _, labels, _ in parts for label in labels], dtype=int)
    return ProbeRegions(torch.cat([vectors for vectors, *_ in parts]).numpy(), classes, images)
