"""How well images and texts fit together, by a CLIP or SigLIP of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize
from transformers import AutoModel

from ...vision_towers.errors import UserError
from .labeller import Workplace
from .models import open_model, open_processor

_BATCH = 256  # texts at once
_UNMASKED = ("siglip", "siglip2")  # whatever their tokenizer gives


class ClipScorer:
    """Cosines of images and texts.

    Raises:
        UserError: no such model, or one that does not embed images and texts.
    """

    def __init__(self, model: str, workplace: Workplace):
        self._model = open_model(AutoModel, model, workplace)
        if not hasattr(self._model, "get_image_features") or not hasattr(self._model, "get_text_features"):
            raise UserError(
                f"'{model}' is a {self._model.config.model_type}; a CLIP or a SigLIP is needed to score texts."
            )
        self._processor = open_processor(model)

    @torch.inference_mode()
    def images(self, images: Sequence[Image.Image]) -> Tensor:
        """`(N, D)` float32 of length 1."""
        inputs: Any = self._processor(images=list(images), return_tensors="pt")
        return self._embeds(self._model.get_image_features(**inputs.to(self._model.device, self._model.dtype)))

    @torch.inference_mode()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """`(N, D)` float32 of length 1. Texts are padded to the longest length that the model knows and cut off there;
        SigLIP was trained so, and sees the padding."""
        found = []
        longest = self._model.config.text_config.max_position_embeddings
        for start in range(0, len(texts), _BATCH):
            some = list(texts[start : start + _BATCH])
            inputs: Any = self._processor(
                text=some, return_tensors="pt", padding="max_length", max_length=longest, truncation=True
            )
            if self._model.config.model_type in _UNMASKED:
                inputs.pop("attention_mask", None)
            found.append(self._embeds(self._model.get_text_features(**inputs.to(self._model.device))))
        return torch.cat(found)

    @staticmethod
    def _embeds(output: Any) -> Tensor:
        return normalize((output if isinstance(output, Tensor) else output.pooler_output).float(), dim=-1)
