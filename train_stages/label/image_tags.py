"""Tags of an image: of a list, by the cosines of a scorer; or of a model that tags images by itself."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, AutoModelForImageClassification

from ...vision_towers.errors import UserError
from .labeller import Workplace
from .models import open_model, open_processor


class Tagger:
    """A classifier of transformers whose classes are tags, each true or not by itself (`problem_type` multi-label), as
    those of RAM are. RAM itself is no model of transformers.

    threshold: probabilities of at least that are kept, at most `limit` an image.
    Raises UserError when there is no such model, or its classes exclude each other.
    """

    def __init__(self, model: str, workplace: Workplace, threshold: float, limit: int):
        self._model = open_model(AutoModelForImageClassification, model, workplace)
        if self._model.config.problem_type != "multi_label_classification":
            raise UserError(
                f"the classes of '{model}' exclude each other (problem_type {self._model.config.problem_type!r}); a "
                "tagger of multi_label_classification is needed, or a list for --tags."
            )
        self._processor = open_processor(model, AutoImageProcessor)
        self._threshold, self._limit = threshold, limit

    @torch.inference_mode()
    def __call__(self, images: Sequence[Image.Image]) -> list[list[str]]:
        """The tags of each RGB image, the likeliest first."""
        inputs: Any = self._processor(images=list(images), return_tensors="pt")
        outputs = self._model(**inputs.to(self._model.device, self._model.dtype))
        names = [self._model.config.id2label[place] for place in range(outputs.logits.shape[1])]
        return best_tags(outputs.logits.float().sigmoid(), names, self._threshold, self._limit)


def best_tags(scores: Tensor, names: Sequence[str], threshold: float, limit: int) -> list[list[str]]:
    """For each row of `(N, T)` the names of its scores of at least `threshold`, the best first, at most `limit`."""
    found = []
    for row in scores.tolist():
        good = [place for place, score in enumerate(row) if score >= threshold]
        found.append([names[place] for place in sorted(good, key=lambda place: -row[place])[:limit]])
    return found


def read_tags(path: str) -> list[str]:
    """The lines of a text file, each once.

    Raises:
        UserError: there is no such file, or nothing in it.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        raise UserError(f"{path}: there is no such file of tags; give one with a tag a line.") from None
    tags = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if not tags:
        raise UserError(f"{path}: there is no tag in this file.")
    return tags
