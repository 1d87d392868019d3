"""Masks of boxes, by a SAM-like model of transformers that takes boxes as prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoModelForMaskGeneration, AutoProcessor, Sam3TrackerModel, Sam3TrackerProcessor

from ..masks import encode_mask
from ..records import Mask
from .labeller import Workplace
from .models import open_model, open_processor
from .region_filters import Box

# The checkpoint of SAM 3 names the processor of videos, which takes no boxes.
_PROCESSORS = {Sam3TrackerModel: Sam3TrackerProcessor}


class BoxMasker:
    """Of the masks that the model gives for a box the one of the best expected quality.

    Raises:
        UserError: no such model.
    """

    def __init__(self, model: str, workplace: Workplace):
        self._model = open_model(AutoModelForMaskGeneration, model, workplace)
        self._processor = open_processor(model, _PROCESSORS.get(type(self._model), AutoProcessor))

    @torch.inference_mode()
    def __call__(self, image: Image.Image, boxes: Sequence[Box]) -> list[Mask | None]:
        """A mask for each xyxy box; None where it is empty."""
        if not boxes:
            return []
        prompts = [[list(box) for box in boxes]]
        inputs: Any = self._processor(images=image, input_boxes=prompts, return_tensors="pt")
        sizes = inputs["original_sizes"].tolist()
        resized = inputs.pop("reshaped_input_sizes", None)  # SAM has them, SAM 2 not
        outputs = self._model(**inputs.to(self._model.device, self._model.dtype))
        masks = self._processor.image_processor.post_process_masks(
            outputs.pred_masks.float(),
            sizes,
            **({} if resized is None else {"reshaped_input_sizes": resized.tolist()}),
        )[0]
        best = outputs.iou_scores[0].argmax(dim=-1)
        chosen = masks[torch.arange(len(boxes)), best.to(masks.device)].cpu().numpy().astype(bool)
        return [Mask(**encode_mask(np.asarray(mask))) if mask.any() else None for mask in chosen]
