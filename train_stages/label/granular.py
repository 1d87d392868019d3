"""UMG-CLIP's labels (arXiv 2401.06397): tags and captions of the image, of its boxes, and masks.

Of the paper only the abstract and the introduction were open to us. There a tagger (RAM), captioners (BLIP-2, Shikra),
EVA-CLIP as a filter, a detector (ViTDet), a captioner of regions and SAM are said to be used; each is a model of
transformers here. The filters of images and boxes are those that the same group states for GranViT (arXiv 2510.21501).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

from PIL import Image
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from torch import Tensor

from ...vision_towers.errors import UserError
from ..records import Record, Region
from .box_masks import BoxMasker
from .captioner import Captioner
from .clip_scores import ClipScorer
from .detectors import Detection, Detector
from .image_tags import Tagger, best_tags, read_tags
from .labeller import Engine, Labelled, PassedOver, Workplace, model_facts
from .region_filters import area, is_longish, pixel_box

_CROPS = 16  # at once


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class GranularConfig:
    """From GranViT: image_min_edge (images above it), max_aspect (of images and boxes), box_min_area (boxes above it,
    in square pixels), and at least one box an image. The rest is ours.

    scorer: CLIP or SigLIP. tags: text file, one a line, for the scorer to choose from; or tag_model: one that tags
    images by itself, see `Tagger`. detector: of phrases (it looks for the image's tags), or of its own classes.
    captioner: of images and of crops; None takes the captions that records have, and captions no region. mask_model:
    SAM or the like; None for no masks. tag_template: {} is the tag. min_tag_score, min_caption_score: cosines of
    `scorer`; those of SigLIPs are lower, about 0.1. min_tag_probability: of `tag_model`.
    """

    scorer: str
    detector: str
    tags: str | None = None
    tag_model: str | None = None
    captioner: str | None = None
    mask_model: str | None = None
    prompt: str = "Describe this image in one sentence."
    max_new_tokens: int = 64
    tag_template: str = "a photo of a {}"
    min_tag_score: float = 0.22
    min_tag_probability: float = 0.5
    max_tags: int = 20
    min_caption_score: float = 0.22
    detector_size: int | None = None
    min_box_score: float = 0.3
    nms_iou: float = 0.7
    image_min_edge: int = 448
    max_aspect: float = 3.0
    box_min_area: float = 100.0**2


class GranularLabeller:
    """Adds tags and the new caption to a record, and regions with `category`, `tags`, a caption and a mask; captions
    that do not fit their picture are dropped, also those that the record had."""

    def __init__(self, config: GranularConfig, workplace: Workplace):
        self._config, self._source = config, workplace.source
        self._score = ClipScorer(config.scorer, workplace)
        self._tag = self._open_tagger(workplace)
        self._detect = Detector(
            config.detector,
            workplace,
            size=config.detector_size,
            threshold=config.min_box_score,
            nms_iou=config.nms_iou,
        )
        self._caption = (
            Captioner(config.captioner, workplace, config.prompt, config.max_new_tokens) if config.captioner else None
        )
        self._mask = BoxMasker(config.mask_model, workplace) if config.mask_model else None

    def label(self, images: Sequence[Image.Image], records: Sequence[Record]) -> list[Labelled | PassedOver]:
        """See `Labeller`."""
        results: list[Labelled | PassedOver] = [PassedOver("image too small or too long")] * len(images)
        places = [place for place, image in enumerate(images) if self._is_usable(image)]
        if not places:
            return results
        chosen = [images[place] for place in places]
        embeds = self._score.images(chosen)
        tags = self._tag(chosen, embeds)
        found = self._detect(chosen, tags if self._detect.takes_texts else None)
        boxes = [[each for each in of_image if self._is_good(each)] for of_image in found]
        kept = [row for row, of_image in enumerate(boxes) if of_image]
        # Captions are what takes longest: only of images that stay.
        written = self._caption([chosen[row] for row in kept]) if self._caption else [""] * len(kept)
        for place in places:
            results[place] = PassedOver("no region")
        for row, text in zip(kept, written, strict=True):
            record = records[places[row]]
            # A tag or phrase that is found cannot be one that is true of nothing here.
            known = {*tags[row], *(each.text for each in boxes[row])}
            fields = {
                "captions": self._fitting(embeds[row], [text, *record.captions]),
                "tags": list(dict.fromkeys([*record.tags, *tags[row]])),
                "absent": [each for each in record.absent if each not in known],
                "regions": [*record.regions, *self._regions(chosen[row], boxes[row])],
            }
            results[places[row]] = Labelled(record.model_copy(update=fields))
        return results

    def _is_usable(self, image: Image.Image) -> bool:
        return min(image.size) > self._config.image_min_edge and not is_longish(*image.size, self._config.max_aspect)

    def _is_good(self, found: Detection) -> bool:
        x0, y0, x1, y1 = found.box
        longish = is_longish(x1 - x0, y1 - y0, self._config.max_aspect)
        return area(found.box) > self._config.box_min_area and not longish

    def _open_tagger(self, workplace: Workplace) -> Callable[[Sequence[Image.Image], Tensor], list[list[str]]]:
        """Images and their embeddings -> tags of each, the best first."""
        config = self._config
        if config.tag_model is not None:
            tag = Tagger(config.tag_model, workplace, config.min_tag_probability, config.max_tags)
            return lambda images, embeds: tag(images)
        assert config.tags is not None
        names = read_tags(config.tags)
        of_tags = self._score.texts([config.tag_template.format(name) for name in names])
        return lambda images, embeds: best_tags(embeds @ of_tags.T, names, config.min_tag_score, config.max_tags)

    def _fitting(self, embed: Any, captions: Sequence[str]) -> list[str]:
        """Those that fit the picture of this embedding, each once."""
        texts = [text for text in dict.fromkeys(captions) if text]
        if not texts:
            return []
        scores = (self._score.texts(texts) @ embed).tolist()
        return [text for text, score in zip(texts, scores, strict=True) if score >= self._config.min_caption_score]

    def _regions(self, image: Image.Image, found: Sequence[Detection]) -> list[Region]:
        captions: list[list[str]] = [[] for _ in found]
        if self._caption is not None:
            crops = [image.crop(pixel_box(each.box)) for each in found]
            captions = []
            for start in range(0, len(crops), _CROPS):
                some = crops[start : start + _CROPS]
                texts = zip(self._score.images(some), self._caption(some), strict=True)
                captions += [self._fitting(row, [text]) for row, text in texts]
        masks = self._mask(image, [each.box for each in found]) if self._mask else [None] * len(found)
        return [
            Region(
                box_xyxy=each.box,
                category=each.text,
                tags=[each.text],
                captions=of_region,
                mask=mask,
                score=each.score,
                source=self._source,
            )
            for each, of_region, mask in zip(found, captions, masks, strict=True)
        ]


def _facts(config: GranularConfig) -> dict[str, Any]:
    named = {
        "scorer": config.scorer,
        "detector": config.detector,
        "captioner": config.captioner,
        "masks": config.mask_model,
        "tags": config.tag_model,
    }
    if (config.tags is None) == (config.tag_model is None):
        raise UserError("tags come from a list or from a model: give either --tags or --tag-model.")
    tags = {}
    if config.tags is not None:
        listed = read_tags(config.tags)
        tags = {"tags": {"count": len(listed), "sha256": hashlib.sha256("\n".join(listed).encode()).hexdigest()}}
    models = {name: model_facts(model) for name, model in named.items() if model is not None}
    return {"models": models, **tags}


_WRITES = ("captions", "tags", *(f"regions.{name}" for name in ("category", "tags", "captions", "mask", "score")))
ENGINE = Engine("granular", GranularConfig, GranularLabeller, _facts, _WRITES)
