"""Captions by any image-text-to-text model of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

from ...mllm import RegionLlavaProcessor
from .labeller import Workplace
from .models import open_model, open_processor


class Captioner:
    """One caption an image, by greedy decoding. prompt: what a chat model is asked; a model without a chat template
    (BLIP) captions unasked.

    Raises:
        UserError: no such model.
    """

    def __init__(self, model: str, workplace: Workplace, prompt: str, max_new_tokens: int):
        self._model = open_model(AutoModelForImageTextToText, model, workplace)
        self._processor = open_processor(model)
        self._limit = max_new_tokens
        tokenizer = self._processor.tokenizer
        tokenizer.padding_side = "left"  # generation goes on at the right
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        self._prompt: str | None = None
        if getattr(self._processor, "chat_template", None) or tokenizer.chat_template:
            asked = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}]
            self._prompt = self._processor.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)

    @torch.inference_mode()
    def __call__(self, images: Sequence[Image.Image]) -> list[str]:
        """A caption for each RGB image; an empty one when the model says nothing."""
        if not images:
            return []
        asked: dict[str, Any] = {} if self._prompt is None else {"text": [self._prompt] * len(images), "padding": True}
        if not isinstance(self._processor, RegionLlavaProcessor):  # ours gives nothing but tensors
            asked["return_tensors"] = "pt"
        inputs: Any = self._processor(images=list(images), **asked)
        inputs = inputs.to(self._model.device, self._model.dtype)
        written = self._model.generate(**inputs, max_new_tokens=self._limit, do_sample=False)
        prompt = inputs.get("input_ids")
        # Decoder-only models repeat the prompt, others do not.
        if prompt is not None and torch.equal(written[:, : prompt.shape[1]], prompt):
            written = written[:, prompt.shape[1] :]
        texts = self._processor.batch_decode(written, skip_special_tokens=True)
        return [" ".join(text.split()) for text in texts]
