"""Captions by any image-text-to-text model of transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

from ...mllm import RegionLlavaProcessor
from ...mllm.answers import model_inputs, user_prompt
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
        self._question, self._limit = prompt, max_new_tokens
        tokenizer = self._processor.tokenizer
        tokenizer.padding_side = "left"  # generation goes on at the right
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token

    @torch.inference_mode()
    def __call__(self, images: Sequence[Image.Image]) -> list[str]:
        """A caption for each RGB image; an empty one when the model says nothing."""
        if not images:
            return []
        inputs = self._inputs(images)
        written = self._model.generate(**inputs, max_new_tokens=self._limit, do_sample=False)
        prompt = inputs.get("input_ids")
        # Decoder-only models repeat the prompt, others do not.
        if prompt is not None and torch.equal(written[:, : prompt.shape[1]], prompt):
            written = written[:, prompt.shape[1] :]
        texts = self._processor.batch_decode(written, skip_special_tokens=True)
        return [" ".join(text.split()) for text in texts]

    def _inputs(self, images: Sequence[Image.Image]) -> Mapping[str, Any]:
        pictures = list(images)
        if isinstance(self._processor, RegionLlavaProcessor):
            prompt = user_prompt(self._processor, self._question)
            inputs = self._processor(images=pictures, text=[prompt] * len(pictures), padding=True)
            return model_inputs(self._model, inputs)
        if self._processor.chat_template is None:
            inputs = self._processor(images=pictures, return_tensors="pt")
        else:
            # Processors differ in how they take several pictures, and in who writes the first token; this one call
            # of transformers knows.
            inputs = self._processor.apply_chat_template(
                [self._asked(picture) for picture in pictures],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                processor_kwargs={"padding": True},
            )
        return inputs.to(self._model.device, self._model.dtype)

    def _asked(self, picture: Image.Image) -> list[dict[str, Any]]:
        return [
            {"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": self._question}]}
        ]
