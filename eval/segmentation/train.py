"""Train a head, and the adapters of its tower, on the masks of region records."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ...train_stages.pixels import PixelCache
from ...train_stages.records import Record
from ...train_stages.region_labels import NO_CLASS
from ...vision_towers import UserError
from .decoder import FINER
from .label_maps import VOID, PanopticMap, SegmentClasses, panoptic_map
from .panoptic_loss import Targets, panoptic_loss
from .segmenter import Segmenter, SegmenterConfig
from .semantic_head import semantic_loss
from .text_space import TextSpace

WARMUP = 0.1  # share of the steps
REMEMBERED = 2048  # label maps; drawing one from run lengths takes longer than a small tower's pass


@dataclass(frozen=True)
class TrainConfig:
    """steps: of AdamW, one-cycle schedule, on `batch_size` whole images without augmentation. lr, tuning_lr: the
    largest learning rates, of the head and of adapters. seed: of weights and batches."""

    steps: int
    batch_size: int = 8
    lr: float = 1e-3
    tuning_lr: float = 1e-4
    weight_decay: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 0 or self.batch_size < 1:
            raise UserError("a head learns in 0 steps or more, of at least 1 image each.")


def train_segmenter(
    space: TextSpace,
    config: SegmenterConfig,
    cache: PixelCache,
    classes: SegmentClasses,
    learned: Sequence[int],
    texts: Tensor,
    training: TrainConfig,
) -> Segmenter:
    """A segmenter, trained on the classes `learned`; pixels of other classes are void to it, and their texts unseen.

    The same arguments give the same segmenter; with 0 steps it is the untrained one.

    Args:
        texts: `(C, J)` of length 1, one for each class.
    Raises:
        UserError: no pixel of a learned class, or more segments in an image than a panoptic head proposes.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(training.seed)
        segmenter = Segmenter(space, config)
    segmenter.eval()  # the tower has no dropout to switch on, and the head none at all
    if not training.steps:
        return segmenter
    numbers = [VOID] * len(classes)
    for new, old in enumerate(learned):
        numbers[old] = new
    own = texts[list(learned)]

    @lru_cache(REMEMBERED)
    def truth(row: int) -> PanopticMap:
        rows, columns = segmenter.tower.spec.grid(*cache.pixels.shape[-2:])
        fine = (FINER * rows, FINER * columns)
        width, height = cache.frames[row].input_size
        view = (height, width) if config.task == "semantic" else fine
        return panoptic_map(cache.records[row], classes).renumbered(numbers).seen(cache.frames[row], view)

    labelled = np.array([row for row, record in enumerate(cache.records) if _has_any(record, classes, numbers)])
    if not len(labelled):
        raise UserError("no record has a mask of a class that a segmentation could learn from.")
    head = [value for name, value in segmenter.learned().items() if name.startswith("head.")]
    adapters = [value for name, value in segmenter.learned().items() if not name.startswith("head.")]
    groups = [{"params": head, "lr": training.lr}, {"params": adapters, "lr": training.tuning_lr}]
    groups = [group for group in groups if group["params"]]
    optimizer = torch.optim.AdamW(groups, weight_decay=training.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [group["lr"] for group in groups], total_steps=training.steps + 1, pct_start=WARMUP
    )
    rng, waiting = np.random.default_rng(training.seed), []
    with tqdm(total=training.steps, desc=f"a {config.task} head, tuning {config.tuning}", unit="step") as bar:
        for _ in range(training.steps):
            if len(waiting) < min(training.batch_size, len(labelled)):
                waiting = rng.permutation(labelled).tolist()
            batch, waiting = waiting[: training.batch_size], waiting[training.batch_size :]
            found = segmenter(torch.from_numpy(np.array(cache.pixels[batch])), own)
            loss = _loss(found, [truth(row) for row in batch], config)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_([*head, *adapters], 1.0)
            optimizer.step()
            schedule.step()
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
            bar.update()
    return segmenter


def _has_any(record: Record, classes: SegmentClasses, numbers: Sequence[int]) -> bool:
    """Whether a region with a mask is of a learned class, or the background is."""
    if classes.background is not None and numbers[classes.background] != VOID:
        return True
    labels = classes.objects.labels(record)
    return any(
        region.mask is not None and label != NO_CLASS and numbers[label] != VOID
        for region, label in zip(record.regions, labels, strict=True)
    )


def _loss(found: Any, truths: Sequence[PanopticMap], config: SegmenterConfig) -> Tensor:
    if config.task == "semantic":
        return semantic_loss(found, torch.from_numpy(np.stack([truth.semantic for truth in truths])).to(found.device))
    targets = [Targets.of(truth, found.masks.device) for truth in truths]
    most = max(len(target.classes) for target in targets)
    if most > config.queries:
        raise UserError(f"an image has {most} segments and {config.queries} masks are proposed; raise queries.")
    return panoptic_loss(found, targets)
