"""RICE's text regions: PP-OCR finds lines of text and reads them (arXiv 2507.20025, Sec. 3.1).

The label of such a region is the set of token ids of its transcript. That set is made in `pretrain`, by the tokenizer
of the recipe (`region_labels.TextClasses`); what is kept here is the transcript.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
from PIL import Image
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from ...vision_towers.errors import UserError
from ..records import Record, Region
from .labeller import Engine, Labelled, PassedOver, Workplace
from .region_filters import clip_box


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class OcrConfig:
    """min_confidence: of the reading; regions above it are kept (the paper: 0.7)."""

    min_confidence: float = 0.7


class OcrLabeller:
    """Adds to each record a region for every line of text: its upright box, transcript and confidence. Regions that
    were there stay. An image without text is passed over."""

    def __init__(self, config: OcrConfig, workplace: Workplace):
        self._config, self._source = config, workplace.source
        self._read = _open_rapidocr(workplace)

    def label(self, images: Sequence[Image.Image], records: Sequence[Record]) -> list[Labelled | PassedOver]:
        """See `Labeller`."""
        return [self._one(image, record) for image, record in zip(images, records, strict=True)]

    def _one(self, image: Image.Image, record: Record) -> Labelled | PassedOver:
        found = self._read(np.asarray(image)[..., ::-1])  # as OpenCV: blue first
        if found.boxes is None:
            return PassedOver("no text")
        regions = []
        for corners, text, score in zip(found.boxes, found.txts, found.scores, strict=True):
            box = clip_box((*corners.min(axis=0), *corners.max(axis=0)), image.size)
            if score > self._config.min_confidence and text.strip() and box is not None:
                score = round(float(score), 4)
                regions.append(Region(box_xyxy=box, ocr=text.strip(), score=score, source=self._source))
        if not regions:
            return PassedOver("no text")
        return Labelled(record.model_copy(update={"regions": [*record.regions, *regions]}))


def _open_rapidocr(workplace: Workplace) -> Any:
    """RapidOCR with the weights of its wheel: nothing is downloaded."""
    try:
        import onnxruntime  # noqa: F401  (rapidocr's own message for its absence is a page long)
        from rapidocr import RapidOCR
    except ImportError:
        raise UserError(
            "text is read by rapidocr on onnxruntime, which are not installed; pip install 'regiontower[label]'."
        ) from None
    return RapidOCR(
        params={
            "Global.log_level": "error",
            "Global.text_score": 0.0,  # we choose by confidence ourselves, and keep it
            "EngineConfig.onnxruntime.intra_op_num_threads": workplace.threads,
            "EngineConfig.onnxruntime.use_cuda": workplace.device.startswith("cuda"),
        }
    )


def _facts(config: OcrConfig) -> dict[str, Any]:
    try:
        release = version("rapidocr")
    except ModuleNotFoundError:
        release = None
    return {"models": {"ocr": {"id": "rapidocr, its default PP-OCR weights", "revision": release}}}


ENGINE = Engine("rice-ocr", OcrConfig, OcrLabeller, _facts, ("regions.ocr", "regions.score"))
