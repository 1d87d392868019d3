"""What a detector finds that is trained on a frozen tower's tokens (RICE, arXiv 2507.20025, section 4, table 3).

The paper trains Cascade Mask R-CNN in Detectron2. Ours is torchvision's FCOS (Tian et al., arXiv 1904.01355) on
`FrozenPyramid`: it has no anchors to be fitted to a data set, and takes minutes. Its figures compare towers with each
other, and not with the paper.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.models.detection import FCOS
from torchvision.models.detection.anchor_utils import AnchorGenerator
from tqdm import tqdm
from transformers import PreTrainedModel

from ...mllm.boxes import Boxes
from ...train_stages.normalise import PixelNorm
from ...train_stages.pixels import PixelCache
from ...train_stages.region_labels import NO_CLASS, ObjectClasses
from ...vision_towers import TowerSpec, UserError, describe_tower
from .labels import object_labels
from .pyramid import COARSEST, FrozenPyramid

MIN_SCORE = 0.01  # a precision-recall curve wants the unlikely ones, too
WARMUP = 0.1  # share of the steps


@dataclass(frozen=True)
class DetectConfig:
    """steps: of AdamW, one-cycle schedule, on `batch_size` whole images without augmentation. lr: the largest learning
    rate. width: channels of pyramid and head, a multiple of 32 (FCOS has 256, at four times the cost). seed: of weights
    and batches."""

    steps: int
    batch_size: int = 16
    lr: float = 1e-3
    weight_decay: float = 0.05
    width: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UserError(f"a detector cannot learn in {self.steps} steps; give 1 or more.")
        if self.width < 32 or self.width % 32:
            raise UserError(f"width is {self.width}; the head's group norm needs a multiple of 32.")


def detection(
    tower: PreTrainedModel, train: PixelCache, test: PixelCache, classes: ObjectClasses, config: DetectConfig
) -> dict[str, Any]:
    """Train a detector on `train`, and its COCO figures on `test`, in pixels of the original images.

    Objects are the regions that have a class and no transcript. Regions of the test that are stuff, and have a class,
    are crowds: a box in one counts neither way.

    Returns:
        `{"ap", "ap50", "ap75", "n", "classes", "steps"}`, AP in 0..1 and n the objects of the test.
    Raises:
        UserError: no object to learn from, or none to find.
    """
    spec = describe_tower(tower.config)
    detector = train_detector(tower, spec, train, classes, config)
    truth = coco_truth(test, classes)
    count = sum(not row["iscrowd"] for row in truth["annotations"])
    if not count:
        raise UserError("the test has no object of a class that training knows; nothing can be detected.")
    found = average_precision(truth, detect(detector, spec, test))
    return found | {"n": count, "classes": len(classes), "steps": config.steps}


def train_detector(
    tower: PreTrainedModel, spec: TowerSpec, cache: PixelCache, classes: ObjectClasses, config: DetectConfig
) -> FCOS:
    """A detector of `classes`; the tower does not change. The same arguments give the same detector."""
    tower.eval()
    targets = [_target(cache, row, classes) for row in range(len(cache))]
    rows = np.array([row for row, target in enumerate(targets) if len(target["labels"])])
    if not len(rows):
        raise UserError("no record has an object that a detector could learn from.")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)
        detector = _detector(tower, spec, cache.pixels.shape[-1], len(classes), config.width)
    detector.to(tower.device).train()
    norm = PixelNorm(spec.image_mean, spec.image_std).to(tower.device)
    weights = list(detector.parameters())
    optimizer = torch.optim.AdamW(weights, lr=config.lr, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.lr, total_steps=config.steps + 1, pct_start=WARMUP)
    rng, waiting = np.random.default_rng(config.seed), []
    with tqdm(total=config.steps, desc="a detector on frozen tokens", unit="step") as bar:
        for _ in range(config.steps):
            if len(waiting) < min(config.batch_size, len(rows)):
                waiting = rng.permutation(rows).tolist()
            batch, waiting = waiting[: config.batch_size], waiting[config.batch_size :]
            given = [{name: value.to(tower.device) for name, value in targets[row].items()} for row in batch]
            loss = torch.stack(list(detector(_images(cache, batch, norm), given).values())).sum()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            schedule.step()
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
            bar.update()
    return detector.eval()


@torch.inference_mode()
def detect(detector: FCOS, spec: TowerSpec, cache: PixelCache, batch_size: int = 16) -> list[dict[str, Any]]:
    """COCO results of all images: `image_id` is the row of `cache`, `category_id` the class, `bbox` xywh in pixels of
    the original."""
    device = next(detector.parameters()).device
    norm, results = PixelNorm(spec.image_mean, spec.image_std).to(device), []
    for start in tqdm(range(0, len(cache), batch_size), "detecting", unit="batch"):
        rows = list(range(start, min(start + batch_size, len(cache))))
        for row, found in zip(rows, detector(_images(cache, rows, norm)), strict=True):
            boxes = cache.frames[row].to_original(Boxes(found["boxes"].double().cpu().numpy().reshape(-1, 4))).xyxy
            for box, score, label in zip(boxes, found["scores"].tolist(), found["labels"].tolist(), strict=True):
                results.append({"image_id": row, "category_id": label, "bbox": _xywh(box), "score": score})
    return results


def coco_truth(cache: PixelCache, classes: ObjectClasses) -> dict[str, Any]:
    """The objects of `cache` as a COCO data set, in pixels of the original; images are rows, categories classes."""
    # Crowds are of a class, too, though none that is learned.
    every = object_labels(ObjectClasses(classes.names, classes.source, stuff=True))
    annotations = [
        {"image_id": row, "category_id": label, "iscrowd": int(region.stuff), "bbox": _xywh(region.box_xyxy)}
        for row, record in enumerate(cache.records)
        for region, label in zip(record.regions, every(record), strict=True)
        if label != NO_CLASS
    ]
    for number, row in enumerate(annotations, start=1):  # pycocotools reads id 0 as "no match"
        row |= {"id": number, "area": row["bbox"][2] * row["bbox"][3]}
    return {
        "images": [{"id": row, "width": r.width, "height": r.height} for row, r in enumerate(cache.records)],
        "categories": [{"id": number, "name": name} for number, name in enumerate(classes.names)],
        "annotations": annotations,
    }


def average_precision(truth: dict[str, Any], results: list[dict[str, Any]]) -> dict[str, float]:
    """COCO's AP over IoU 0.5:0.95, and at 0.5 and 0.75, by pycocotools."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    if not results:
        return {"ap": 0.0, "ap50": 0.0, "ap75": 0.0}
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its own table
        known: Any = COCO()
        known.dataset = truth
        known.createIndex()
        judge = COCOeval(known, known.loadRes(results), "bbox")
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    return {name: float(value) for name, value in zip(("ap", "ap50", "ap75"), judge.stats[:3], strict=True)}


def detection_line(found: dict[str, Any]) -> str:
    """The figures in a line, for reading."""
    return (
        f"detection after {found['steps']} steps: AP {found['ap']:.3f}, AP50 {found['ap50']:.3f}, AP75 "
        f"{found['ap75']:.3f} over {found['classes']} classes  n = {found['n']}"
    )


def _detector(tower: PreTrainedModel, spec: TowerSpec, side: int, classes: int, width: int) -> FCOS:
    pyramid = FrozenPyramid(tower, spec, side, width)
    return FCOS(
        pyramid,
        classes,
        min_size=side,
        max_size=side,
        image_mean=[0.0] * 3,  # the images are normalised for the tower
        image_std=[1.0] * 3,
        anchor_generator=Places(len(pyramid.levels)),
        score_thresh=MIN_SCORE,
        size_divisible=COARSEST * spec.patch_size,  # whole places at every level
        _skip_resize=True,
    )


class Places(AnchorGenerator):
    """FCOS's points: a square for each place of a level, in its middle and as wide as its stride.

    torchvision's own lie at the corners of the places, and have whole pixels: a quarter of a patch of 14 px has not.
    """

    def __init__(self, levels: int):
        super().__init__(((1,),) * levels, ((1.0,),) * levels)

    def forward(self, image_list: Any, feature_maps: list[Tensor]) -> list[Tensor]:
        """Boxes `(places of all levels, 4)`, xyxy in pixels of the padded batch, the same for each of its images."""
        height, width = image_list.tensors.shape[-2:]
        boxes = []
        for level in feature_maps:
            rows, columns = level.shape[-2:]
            stride = level.new_tensor([width / columns, height / rows])
            places = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).flip(-1).to(level)
            boxes.append(torch.cat([places * stride, (places + 1) * stride], dim=1))
        return [torch.cat(boxes)] * len(image_list.image_sizes)


def _images(cache: PixelCache, rows: Sequence[int], norm: PixelNorm) -> list[Tensor]:
    pixels = torch.from_numpy(np.array(cache.pixels[list(rows)])).to(norm.shift.device)
    return list(norm(pixels))


def _target(cache: PixelCache, row: int, classes: ObjectClasses) -> dict[str, Tensor]:
    record = cache.records[row]
    labels = np.array(object_labels(classes)(record), dtype=int)
    wanted = np.flatnonzero(labels != NO_CLASS)
    boxes, kept = cache.frames[row].to_input(Boxes([record.regions[i].box_xyxy for i in wanted]))
    return {"boxes": boxes.tensor(), "labels": torch.from_numpy(labels[wanted[kept]])}


def _xywh(box: Sequence[float] | np.ndarray) -> list[float]:
    x0, y0, x1, y1 = (float(edge) for edge in box)
    return [x0, y0, x1 - x0, y1 - y0]
