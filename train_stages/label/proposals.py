"""Where candidate regions come from: a model that generates masks, the record itself, or segments of one colour."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForMaskGeneration, MaskGenerationPipeline, pipeline

from ...vision_towers.errors import UserError
from ..masks import encode_mask
from ..records import Mask, Record, Region
from .labeller import Workplace
from .models import open_model, open_processor
from .region_filters import clip_box
from .segments import segment_boxes

Proposer = Callable[[Image.Image, Record], list[Region]]


def record_proposals(image: Image.Image, record: Record) -> list[Region]:
    """The regions that the record has already."""
    del image
    return list(record.regions)


def segment_proposals(image: Image.Image, record: Record) -> list[Region]:
    """Class-agnostic boxes without weights, see `segments`."""
    del record
    found = []
    for box, score in zip(*segment_boxes(image), strict=True):
        inside = clip_box(box, image.size)
        if inside is not None:
            found.append(Region(box_xyxy=inside, score=round(float(score), 4)))
    return found


def mask_proposals(
    model: str,
    workplace: Workplace,
    *,
    min_iou: float,
    min_stability: float,
    points_per_side: int,
    points_per_batch: int,
) -> Proposer:
    """Masks of a SAM-like model (`AutoModelForMaskGeneration`) prompted by a grid of points, and their boxes; score:
    the quality that the model expects.

    min_iou, min_stability: SAM's own thresholds on that quality and on how little a mask changes with its cutoff.
    Raises:
        UserError: no such model.
    """
    network = open_model(AutoModelForMaskGeneration, model, workplace)
    processor = open_processor(model, AutoImageProcessor)
    generate: Any = pipeline(
        "mask-generation",
        model=network,
        image_processor=processor,
        device=workplace.device,
        pipeline_class=_FloatScores,
    )

    def propose(image: Image.Image, record: Record) -> list[Region]:
        del record
        found = generate(
            image,
            pred_iou_thresh=min_iou,
            stability_score_thresh=min_stability,
            points_per_crop=points_per_side,
            points_per_batch=points_per_batch,
        )
        regions = []
        for mask, score in zip(found["masks"], found["scores"], strict=True):
            inside = np.asarray(mask).astype(bool)
            if inside.any():
                code = Mask(**encode_mask(inside))
                regions.append(Region(box_xyxy=mask_box(inside), mask=code, score=round(float(score), 4)))
        return regions

    return propose


class _FloatScores(MaskGenerationPipeline):
    """With scores in float32, as boxes are: in half precision the pipeline hands both to an NMS that takes one type."""

    def postprocess(self, model_outputs: Any, *args: Any, **kwargs: Any) -> Any:
        """See there."""
        outputs = [{**output, "iou_scores": output["iou_scores"].float()} for output in model_outputs]
        return super().postprocess(outputs, *args, **kwargs)


def mask_box(mask: np.ndarray) -> tuple[float, float, float, float]:
    """The xyxy box around the pixels of a `(H, W)` bool mask that has some; its edges are those of the pixels."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


def need_mask_model(name: str | None) -> str:
    """The name; UserError when there is none."""
    if name is None:
        raise UserError(
            "masks are proposed by a SAM-like model: name one with --mask-model, or choose --proposals segments or "
            "record."
        )
    return name
