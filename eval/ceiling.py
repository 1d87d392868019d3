"""What a tower could give at best: supervised heads on its frozen features, scored as the model's answers are.

A model that answers below this loses something between tower and text; a model at this height needs a better tower.

- region: logistic regression on region embeddings, for what a region is (tags and category) and for what it says;
- location: a small convolutional head on the image tokens that the language model would get, one class and one box for
  every token, as in FCOS (Tian et al. 2019, arXiv 1904.01355, without its pyramid). A phrase is located at the token of
  the largest probability of its class.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import box_iou, generalized_box_iou_loss
from tqdm import tqdm
from transformers import PreTrainedModel

from ..mllm.boxes import Boxes
from ..train_stages.normalise import PixelNorm
from ..train_stages.pixels import PixelCache
from ..train_stages.region_labels import NO_CLASS, ObjectClasses
from ..vision_towers import describe_tower
from .probe.classify import linear
from .probe.labels import object_labels, text_labels, transcripts
from .probe.regions import labelled_regions, reader, remembered


@dataclass(frozen=True)
class CeilingConfig:
    """probe_regions: most regions the logistic regression learns from. readouts: of `probe.regions.READOUTS`. width,
    epochs, lr: of the convolutional head."""

    probe_regions: int = 30_000
    readouts: tuple[str, ...] = ("own",)
    width: int = 256
    epochs: int = 12
    batch_size: int = 128
    lr: float = 2e-3
    seed: int = 0


def supervised_ceiling(
    tower: PreTrainedModel, train: PixelCache, test: PixelCache, config: CeilingConfig | None = None
) -> dict[str, float]:
    """Shares of `test` that heads trained on `train` get right, each with its number of rows.

    Returns `region_top1` (tags and category of every region that is no text), `text_top1` (the transcript, among those
    of `train`), for another readout than "own" with its name before (`value_region_top1`), and `located_acc50` (IoU of
    at least 0.5 for every class that stands at one region of its image).
    """
    config = config or CeilingConfig()
    classes = ObjectClasses.of(train.records, "tags", stuff=True)
    found: dict[str, float] = {}
    kinds = {"region": object_labels(classes), "text": text_labels(transcripts(train.records))}
    for readout in config.readouts:
        read, before = remembered(reader(tower, readout)), "" if readout == "own" else f"{readout}_"
        for kind, labels in kinds.items():
            known = labelled_regions(read, train, labels, config.probe_regions)
            right = linear(known, labelled_regions(read, test, labels))
            found |= {f"{before}{kind}_top1": right.value or 0.0, f"{before}{kind}_n": right.n}
    right, total = _locate(tower, train, test, classes, config)
    return found | {"located_acc50": right / max(total, 1), "located_n": total}


@dataclass(frozen=True)
class _Scene:
    """Objects of an image: boxes `(R, 4)` in input pixels, classes `(R,)`."""

    boxes: Tensor
    classes: Tensor


class _TokenHead(nn.Module):
    """Tokens `(B, rows, columns, D)` -> class logits `(B, rows, columns, K + 1)`, the last one for background, and
    distances `(B, rows, columns, 4)` from the token's middle to left, top, right and bottom, in patches."""

    def __init__(self, dim: int, classes: int, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.body = nn.Sequential(
            nn.Conv2d(dim, width, 3, padding=1), nn.GELU(), nn.Conv2d(width, width, 3, padding=1), nn.GELU()
        )
        self.classes = nn.Conv2d(width, classes + 1, 1)
        self.distances = nn.Conv2d(width, 4, 1)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.body(self.norm(tokens).permute(0, 3, 1, 2))
        return self.classes(hidden).permute(0, 2, 3, 1), F.softplus(self.distances(hidden)).permute(0, 2, 3, 1)


def _locate(
    tower, train: PixelCache, test: PixelCache, classes: ObjectClasses, config: CeilingConfig
) -> tuple[int, int]:
    patch = describe_tower(tower.config).patch_size
    tokens, scenes = _tokens(tower, train), [_scene(train, row, classes) for row in range(len(train))]
    generator = torch.Generator().manual_seed(config.seed)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)
        head = _TokenHead(tokens.shape[-1], len(classes), config.width)
    targets = [_targets(scene, tokens.shape[1:3], patch, len(classes)) for scene in scenes]
    optimizer = torch.optim.AdamW(head.parameters(), lr=config.lr, weight_decay=0.05)
    steps = config.epochs * (len(train) // config.batch_size or 1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.lr, total_steps=steps + 1, pct_start=0.1)
    bar = tqdm(total=steps, desc="location head", unit="step")
    while bar.n < steps:
        for batch in torch.randperm(len(train), generator=generator).split(config.batch_size):
            if bar.n == steps:
                break
            loss = _loss(head, tokens[batch].float(), [targets[i] for i in batch.tolist()], patch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            bar.update()
    bar.close()
    return _score(head.eval(), _tokens(tower, test), test, classes, patch)


@torch.inference_mode()
def _tokens(tower, cache: PixelCache, batch_size: int = 64) -> Tensor:
    """What the language model would get: `(n, rows, columns, D)` bf16 of the tower's default feature layer."""
    spec = describe_tower(tower.config)
    norm, found = PixelNorm(spec.image_mean, spec.image_std), []
    for start in tqdm(range(0, len(cache), batch_size), "tokens", unit="batch"):
        pixels = norm(torch.from_numpy(np.array(cache.pixels[start : start + batch_size])))
        hidden = tower(pixels, output_hidden_states=True).hidden_states[spec.default_feature_layer]
        found.append(hidden[:, spec.num_prefix_tokens :].unflatten(1, spec.grid(*pixels.shape[-2:])).bfloat16())
    return torch.cat(found).clone()


def _scene(cache: PixelCache, row: int, classes: ObjectClasses) -> _Scene:
    record = cache.records[row]
    labels = torch.tensor(classes.labels(record), dtype=torch.long)
    boxes, kept = cache.frames[row].to_input(Boxes([region.box_xyxy for region in record.regions]))
    known = labels[kept] != NO_CLASS
    return _Scene(boxes.tensor()[known], labels[kept][known])


def _targets(scene: _Scene, grid_hw: Sequence[int], patch: int, background: int) -> tuple[Tensor, Tensor]:
    """For each token the class `(rows * columns,)` and box `(rows * columns, 4)` of the smallest object whose box
    holds the token's middle; an object that holds no middle takes the nearest token."""
    rows, columns = grid_hw
    middle = _middles(rows, columns, patch)
    classes, boxes = torch.full((len(middle),), background), torch.zeros(len(middle), 4)
    area = (scene.boxes[:, 2:] - scene.boxes[:, :2]).prod(dim=1)
    for index in area.argsort(descending=True).tolist():
        box = scene.boxes[index]
        inside = ((middle > box[:2]) & (middle < box[2:])).all(dim=1)
        if not inside.any():
            inside[(middle - (box[:2] + box[2:]) / 2).norm(dim=1).argmin()] = True
        classes[inside], boxes[inside] = scene.classes[index], box
    return classes, boxes


def _loss(head: _TokenHead, tokens: Tensor, targets: list[tuple[Tensor, Tensor]], patch: int) -> Tensor:
    logits, distances = head(tokens)
    classes = torch.stack([labels for labels, _ in targets]).flatten()
    truth = torch.stack([boxes for _, boxes in targets]).flatten(0, 1)
    objects = classes != logits.shape[-1] - 1
    found = _boxes(distances, patch).flatten(0, 1)[objects]
    by_class = F.cross_entropy(logits.flatten(0, 2), classes)
    return by_class + generalized_box_iou_loss(found, truth[objects], reduction="sum") / objects.sum().clamp(min=1)


def _boxes(distances: Tensor, patch: int) -> Tensor:
    """`(B, rows, columns, 4)` distances in patches -> `(B, rows * columns, 4)` xyxy in input pixels."""
    middle = _middles(distances.shape[1], distances.shape[2], patch)
    reach = distances.flatten(1, 2) * patch
    return torch.cat([middle - reach[..., :2], middle + reach[..., 2:]], dim=-1)


def _middles(rows: int, columns: int, patch: int) -> Tensor:
    """Middles of the patches, `(rows * columns, 2)` xy in input pixels, row by row."""
    y, x = torch.meshgrid(torch.arange(rows) + 0.5, torch.arange(columns) + 0.5, indexing="ij")
    return torch.stack([x, y], dim=-1).reshape(-1, 2) * patch


@torch.inference_mode()
def _score(head: _TokenHead, tokens: Tensor, test: PixelCache, classes: ObjectClasses, patch: int) -> tuple[int, int]:
    right = total = 0
    for row in range(len(test)):
        scene = _scene(test, row, classes)
        counts = Counter(scene.classes.tolist())
        single = [i for i, label in enumerate(scene.classes.tolist()) if counts[label] == 1]
        if not single:
            continue
        logits, distances = head(tokens[row : row + 1].float())
        best = logits.softmax(dim=-1).flatten(1, 2)[0][:, scene.classes[single]].argmax(dim=0)
        found = _boxes(distances, patch)[0][best]
        right += int((box_iou(found, scene.boxes[single]).diagonal() >= 0.5).sum())
        total += len(single)
    return right, total
