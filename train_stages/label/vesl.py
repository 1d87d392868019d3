"""CLOC's pseudo-labels, VESL (arXiv 2410.02746, Sec. 4): caption an image anew, take the noun phrases of the caption,
and detect each in the image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from ..records import Record, Region
from .captioner import Captioner
from .detectors import Detection, Detector, need_text_detector
from .labeller import Engine, Labelled, PassedOver, Workplace, model_facts
from .noun_phrases import noun_phrases
from .taggers import open_tagger, resolve_tagger


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class VeslConfig:
    """From the paper: threshold, max_phrases, and detector_size with OWLv2 L/14. The rest is ours.

    detector: OWLv2, OWL-ViT or Grounding DINO. captioner: any image-text-to-text model; None takes the captions that
    records have. detector_size: pixels of the detector's input, see `Detector`; None for its own. nms_iou: for boxes of
    one phrase. tagger: auto, nltk or textblob.
    """

    detector: str
    captioner: str | None = None
    prompt: str = "Describe this image in detail."
    max_new_tokens: int = 128
    detector_size: int | None = 448
    threshold: float = 0.1
    max_phrases: int = 20
    nms_iou: float = 0.7
    tagger: str = "auto"


class VeslLabeller:
    """Puts the new caption in front of a record's captions, and adds a region for every detected phrase (`texts`). An
    image without a caption is passed over; one in which no phrase is found keeps its caption."""

    def __init__(self, config: VeslConfig, workplace: Workplace):
        self._config, self._source = config, workplace.source
        self._caption = (
            Captioner(config.captioner, workplace, config.prompt, config.max_new_tokens) if config.captioner else None
        )
        self._tagger = open_tagger(resolve_tagger(config.tagger))
        self._detect = Detector(
            config.detector,
            workplace,
            size=config.detector_size,
            threshold=config.threshold,
            nms_iou=config.nms_iou,
        )

    def label(self, images: Sequence[Image.Image], records: Sequence[Record]) -> list[Labelled | PassedOver]:
        """See `Labeller`."""
        if self._caption is None:
            captions = [list(record.captions) for record in records]
        else:
            captions = [[text] if text else [] for text in self._caption(images)]
        phrases = [noun_phrases(of_image, self._tagger, self._config.max_phrases) for of_image in captions]
        detections = self._detect(images, phrases)
        return [
            self._one(record, of_image, found) if of_image else PassedOver("no caption")
            for record, of_image, found in zip(records, captions, detections, strict=True)
        ]

    def _one(self, record: Record, captions: list[str], found: list[Detection]) -> Labelled:
        regions = [
            Region(box_xyxy=each.box, texts=[each.text], score=each.score, source=self._source) for each in found
        ]
        all_captions = list(dict.fromkeys([*captions, *record.captions]))
        # A phrase that is found here cannot be one that is true of nothing here.
        texts = {each.text for each in found}
        absent = [text for text in record.absent if text not in texts]
        fields = {"captions": all_captions, "absent": absent, "regions": [*record.regions, *regions]}
        return Labelled(record.model_copy(update=fields))


def _facts(config: VeslConfig) -> dict[str, Any]:
    models = {"detector": model_facts(need_text_detector(config.detector))}
    if config.captioner is not None:
        models["captioner"] = model_facts(config.captioner)
    return {"models": models, "tagger": resolve_tagger(config.tagger)}


ENGINE = Engine("vesl", VeslConfig, VeslLabeller, _facts, ("captions", "regions.texts", "regions.score"))
