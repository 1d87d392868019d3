"""Regions cut out of their original image with some of their surroundings, a pass of the tower for each."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import islice

import numpy as np
import torch
from PIL import Image
from transformers import PreTrainedModel

from ...train_stages.normalise import PixelNorm
from ...train_stages.pixels import Fill, PixelCache, to_pixels
from ...train_stages.record_io import RecordSet, load_record_image
from ...train_stages.region_labels import NO_CLASS
from ...vision_towers import describe_tower
from .regions import BATCH, Labels, ProbeRegions

Box = tuple[float, float, float, float]


def enlarged(box_xyxy: Box, factor: float, size: tuple[int, int]) -> Box:
    """The box with both sides `factor` times as long about the same middle, cut to an image of `size` (width, height):
    all in pixels."""
    x0, y0, x1, y1 = box_xyxy
    dx, dy = (factor - 1) / 2 * (x1 - x0), (factor - 1) / 2 * (y1 - y0)
    return max(0.0, x0 - dx), max(0.0, y0 - dy), min(float(size[0]), x1 + dx), min(float(size[1]), y1 + dy)


@torch.inference_mode()
def enlarged_crops(
    tower: PreTrainedModel, records: RecordSet, cache: PixelCache, labels: Labels, factor: float, fill: Fill
) -> ProbeRegions:
    """The pooled output for each region of `cache` that has a class in `labels`.

    Each region's box, `enlarged` by `factor` and rounded outwards to whole pixels, is cut from the original image and
    scaled to fit the tower's own square; the rest of the square is `fill`.

    records: where the images of `cache` lie.
    """
    tower.eval()
    spec = describe_tower(tower.config)
    norm = PixelNorm(spec.image_mean, spec.image_std).to(tower.device)
    classes: list[int] = []
    images: list[int] = []

    def crops() -> Iterator[torch.Tensor]:
        for row, record in enumerate(cache.records):
            wanted = [(r, label) for r, label in zip(record.regions, labels(record), strict=True) if label != NO_CLASS]
            if not wanted:
                continue
            image = load_record_image(records.root, record)
            for region, label in wanted:
                classes.append(label)
                images.append(row)
                box = enlarged(region.box_xyxy, factor, (record.width, record.height))
                yield torch.from_numpy(to_pixels(_cut(image, box), spec.image_size, fill)[0])

    total = sum(label != NO_CLASS for record in cache.records for label in labels(record))
    source, found = crops(), []
    for _ in range(0, total, BATCH):
        pixels = torch.stack(list(islice(source, BATCH))).to(tower.device)
        found.append(tower(norm(pixels)).pooler_output.float().cpu())
    features = torch.cat(found).numpy() if found else np.zeros((0, 1), dtype=np.float32)
    return ProbeRegions(features, np.array(classes, dtype=int), np.array(images, dtype=int))


def _cut(image: Image.Image, box: Box) -> Image.Image:
    return image.crop((math.floor(box[0]), math.floor(box[1]), math.ceil(box[2]), math.ceil(box[3])))
