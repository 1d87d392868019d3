"""Boxes of named things: of any phrase (OWL-ViT, OWLv2, Grounding DINO), or of a model's own classes (DETR)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoConfig, AutoModelForObjectDetection, AutoModelForZeroShotObjectDetection

from ...vision_towers.errors import UserError
from ...vision_towers.packaged import model_source
from .labeller import Workplace, no_model
from .models import open_model, open_processor
from .region_filters import Box, clip_box, suppress


class Detection(NamedTuple):
    """box: xyxy in pixels of the image, inside it."""

    box: Box
    score: float
    text: str


class Detector:
    """A detection model of transformers.

    size: pixels of its input where that is a square (OWL's), of the shorter side elsewhere, where a limit of the longer
    one keeps its proportion; the model's own when None.
    threshold: on a box's best score. nms_iou: of two boxes of one text that overlap more the better one stays.
    Raises UserError when there is no such model, or it is of no kind known here.
    """

    def __init__(self, model: str, workplace: Workplace, *, size: int | None, threshold: float, nms_iou: float):
        kind = detector_kind(model)
        self._logits = _TEXT_LOGITS.get(kind)
        auto = AutoModelForZeroShotObjectDetection if self._logits else AutoModelForObjectDetection
        self._model = open_model(auto, model, workplace)
        self._processor = open_processor(model)
        self._images = getattr(self._processor, "image_processor", self._processor)
        self._threshold, self._nms_iou = threshold, nms_iou
        self._padding = "max_length" if kind in _OWL else True
        self._forward: dict[str, Any] = {}
        if size is not None:
            self._images.size = _resized(self._images.size, size)
        if kind in _OWL:
            self._forward["interpolate_pos_encoding"] = True  # for sizes that it was not trained at

    @property
    def takes_texts(self) -> bool:
        """Whether it looks for texts, and not for classes of its own."""
        return self._logits is not None

    @torch.inference_mode()
    def __call__(
        self, images: Sequence[Image.Image], texts: Sequence[Sequence[str]] | None = None
    ) -> list[list[Detection]]:
        """Detections of each image, best first. texts: for each image what to look for; a box belongs to the text of
        its highest score. An image without texts has none."""
        asked = [True] * len(images) if texts is None else [bool(of_image) for of_image in texts]
        chosen = [image for image, wanted in zip(images, asked, strict=True) if wanted]
        found: list[list[Detection]] = []
        if chosen:
            queries = None if texts is None else [list(map(_plain, of_image)) for of_image in texts if of_image]
            found = self._detect(chosen, queries)
        left = iter(found)
        return [next(left) if wanted else [] for wanted in asked]

    def _detect(self, images: list[Image.Image], queries: list[list[str]] | None) -> list[list[Detection]]:
        if (queries is not None) != self.takes_texts:
            raise ValueError("a detector of texts needs texts, another takes none")
        sizes = [(image.height, image.width) for image in images]
        words = {} if queries is None else {"text": queries, "padding": self._padding, "truncation": True}
        inputs = self._processor(images=images, return_tensors="pt", **words)
        inputs = inputs.to(self._model.device, self._model.dtype)
        outputs = self._model(**inputs, **self._forward)
        if queries is not None and self._logits is not None:
            outputs.logits = self._logits(outputs.logits, inputs.input_ids, queries, self._processor.tokenizer)
        names: list[Any] = queries or [self._model.config.id2label] * len(images)
        rows = self._images.post_process_object_detection(outputs, threshold=self._threshold, target_sizes=sizes)
        return [
            self._best(row, [of_image[label] for label in row["labels"].tolist()], image.size)
            for row, of_image, image in zip(rows, names, images, strict=True)
        ]

    def _best(self, row: dict[str, Tensor], names: list[str], size: tuple[int, int]) -> list[Detection]:
        found = []
        for box, score, name in zip(row["boxes"].tolist(), row["scores"].tolist(), names, strict=True):
            inside = clip_box(box, size)
            if inside is not None:
                found.append(Detection(inside, round(score, 4), name))
        groups = [names.index(detection.text) for detection in found]
        kept = suppress([each.box for each in found], [each.score for each in found], groups, self._nms_iou)
        return [found[index] for index in kept]


def detector_kind(model: str) -> str:
    """The model type of a detector."""
    try:
        return AutoConfig.from_pretrained(model_source(model)).model_type
    except (OSError, ValueError) as error:
        raise no_model(model, error) from error


def need_text_detector(model: str) -> str:
    """The name of a detector that looks for texts; UserError when it does not."""
    kind = detector_kind(model)
    if kind not in _TEXT_LOGITS:
        raise UserError(f"'{model}' is a {kind}; a detector of phrases is needed: {', '.join(_TEXT_LOGITS)}.")
    return model


def _resized(known: Any, size: int) -> dict[str, int]:
    if "height" in known:
        return {"height": size, "width": size}
    if "longest_edge" not in known:
        return {"shortest_edge": size}
    return {"shortest_edge": size, "longest_edge": round(size * known["longest_edge"] / known["shortest_edge"])}


def _plain(text: str) -> str:
    return " ".join(text.lower().replace(".", " ").split())  # Grounding DINO separates texts by full stops


def _owl_logits(logits: Tensor, ids: Tensor, queries: Sequence[Sequence[str]], tokenizer: Any) -> Tensor:
    """Texts are padded to the longest list of the batch, and the padding is scored like a text: it is taken out."""
    del ids, tokenizer
    logits = logits.clone()
    for row, of_image in zip(logits, queries, strict=True):
        row[:, len(of_image) :] = -torch.inf
    return logits


def _dino_logits(logits: Tensor, ids: Tensor, queries: Sequence[Sequence[str]], tokenizer: Any) -> Tensor:
    """From tokens `(B, Q, T)` to texts `(B, Q, N)`: the best of a text's tokens. Texts end at full stops."""
    stop = tokenizer.convert_tokens_to_ids(".")
    silent = torch.tensor([stop, *tokenizer.all_special_ids], device=ids.device)
    of_text = (ids == stop).cumsum(dim=1).masked_fill(torch.isin(ids, silent), -1)
    found = logits.new_full((*logits.shape[:2], max(map(len, queries))), -torch.inf)
    for image, of_image in enumerate(queries):
        for text in range(len(of_image)):
            tokens = torch.nonzero(of_text[image] == text).flatten()
            if len(tokens):  # a long list is cut off
                found[image, :, text] = logits[image][:, tokens].amax(dim=1)
    return found


_OWL = ("owlvit", "owlv2")
_TEXT_LOGITS = {
    "owlvit": _owl_logits,
    "owlv2": _owl_logits,
    "grounding-dino": _dino_logits,
    "mm-grounding-dino": _dino_logits,
}
