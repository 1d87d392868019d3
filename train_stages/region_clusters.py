"""RICE's object labels: k-means over region features, each region labelled with its nearest centre (paper, Sec. 3.1).

    y_ij = argmin_k || f_ij - c_k ||_2        (Eq. 1), f_ij the feature of region j of image i

Features are scaled to length 1 before, so the nearest centre is also the one of the largest cosine to it (spherical
k-means; the paper does not say). One flat k-means in memory; for millions of centres see `label.branched_kmeans`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from safetensors.numpy import save_file
from torch.nn.functional import normalize
from transformers import PreTrainedModel

from ..mllm.boxes import Boxes, mean_colour
from ..vision_towers import describe_tower
from .kmeans import find_centres, nearest_centres, open_faiss, refuse_too_many
from .pixels import PixelCache
from .record_io import RecordSet, write_records
from .region_features import crop_features, region_features


@dataclass(frozen=True)
class ClusterConfig:
    """feature: what is clustered. "crop": the pooled feature of the region cut out and enlarged to `crop_side` pixels,
    as an image tower without regions sees it; "masked_crop": the same with everything outside of the region's mask
    (where it has one) filled with the mean colour; "region": the tower's own region embedding. The paper clusters CLIP
    features of SAM's regions and does not say how they are cut. iterations: of k-means."""

    feature: Literal["masked_crop", "crop", "region"] = "masked_crop"
    crop_side: int | None = None
    batch_size: int = 256
    iterations: int = 20
    seed: int = 0


@dataclass(frozen=True)
class RegionClusters:
    """centres: (K, D) float32, length 1. labels: for each image of the cache the cluster of each of its regions, -1
    where the input shows nothing of one."""

    centres: np.ndarray
    labels: list[np.ndarray]


def cluster_regions(
    tower: PreTrainedModel, cache: PixelCache, clusters: int, config: ClusterConfig | None = None
) -> RegionClusters:
    """K-means (faiss) over the features of every region of `cache`; the same seed gives the same clusters.

    Args:
        tower: any; with `feature="region"` one with a region readout.
        clusters: K.
    Raises:
        UserError: faiss is not installed, or there are fewer than two regions a cluster.
    """
    config = config or ClusterConfig()
    open_faiss()  # that it is missing should be said before features are computed
    boxes, kept, masks = [], [], []
    for record, frame in zip(cache.records, cache.frames, strict=True):
        visible, indices = frame.to_input(Boxes([region.box_xyxy for region in record.regions]))
        boxes.append(visible)
        kept.append(indices)
        masks.append([record.regions[index].mask for index in indices])
    total = sum(map(len, boxes))
    refuse_too_many(clusters, total)
    asked = (tower, cache, range(len(cache)), boxes, config.batch_size, "features of regions")
    if config.feature == "region":
        found = region_features(*asked)
    else:
        shown = masks if config.feature == "masked_crop" else None
        found = crop_features(*asked, side=config.crop_side, masks=shown)
    features = normalize(torch.cat(list(found)), dim=-1).cpu().numpy()
    centres = find_centres(features, clusters, iterations=config.iterations, seed=config.seed)
    nearest, _ = nearest_centres(features, centres)
    labels = [np.full(len(record.regions), -1) for record in cache.records]
    ends = np.cumsum([len(indices) for indices in kept])
    for row, indices, of_image in zip(labels, kept, np.split(nearest, ends[:-1]), strict=True):
        row[indices] = of_image
    return RegionClusters(centres, labels)


def write_clustered(
    records: RecordSet,
    tower: PreTrainedModel,
    clusters: int,
    out: Path,
    config: ClusterConfig | None = None,
    *,
    cache_dir: Path | None = None,
    side: int | None = None,
) -> Path:
    """Write `records` with the `cluster` of each region to `out` (JSONL), the centres to `OUT.centres.safetensors`.

    Images keep their names: read `out` with the same image root, or write it into the folder of the records.
    side: pixels of the letterboxed square; the tower's own when absent. Returns `out`.
    """
    spec = describe_tower(tower.config)
    cache = PixelCache.build(records, side or spec.image_size, cache_dir, fill=mean_colour(spec.image_mean))
    found = cluster_regions(tower, cache, clusters, config)
    labelled = (
        record.model_copy(
            update={
                "regions": [
                    region.model_copy(update={"cluster": None if label < 0 else int(label)})
                    for region, label in zip(record.regions, labels, strict=True)
                ]
            }
        )
        for record, labels in zip(cache.records, found.labels, strict=True)
    )
    write_records(out, labelled)
    save_file({"centres": found.centres}, out.with_suffix(".centres.safetensors"))
    return out
