"""The items of CLOC's stage 0: pixels, a caption, and a few regions with a text each (arXiv 2410.02746, Sec. 3.4)."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..mllm.boxes import Boxes, ImageFrame
from .augment import AugmentConfig, random_view
from .pretrain_data import CaptionTokens, caption_of_view, named_regions
from .records import Record


class GroundedImage(NamedTuple):
    """What is known of one image: regions with a text, `(R, 4)` in input pixels, and the record's captions.
    words: of the regions, `region_text`."""

    boxes: Boxes
    words: list[str]
    captions: list[str]


class GroundedCaptionItems:
    """Images with a caption and at most `regions_per_image` regions with words, drawn anew each time.

    The caption names what is in the view (as `CaptionItems` does with "visible") or is one of the record's own. An
    image without words for any region takes part with its caption alone; one without either is left out.

    view: pixels of the square the tower gets; the whole input when absent.
    Raises UserError when the tokenizer lacks a token that the objective needs.
    """

    nothing = "no record has captions or regions with words; the cloc objective needs them"

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_tokens: int,
        regions_per_image: int,
        augment: AugmentConfig,
        view: int | None = None,
    ):
        self.tokens = CaptionTokens(tokenizer, max_tokens)
        self._count, self._augment, self._view = regions_per_image, augment, view

    def prepare(self, record: Record, frame: ImageFrame) -> GroundedImage | None:
        """Captions and regions with words; None when there are neither."""
        boxes, words = named_regions(record, frame)
        return GroundedImage(boxes, words, record.captions) if words or record.captions else None

    def item(self, pixels: Tensor, known: GroundedImage, rng: np.random.Generator) -> dict[str, Any]:
        """A random view of uint8 `pixels (3, S, S)`: `pixel_values` uint8 (3, view, view), `input_ids` the token ids of
        its caption, `boxes` (R, 4) float32 xyxy in its pixels, R from 0 on, `region_input_ids` R lists of token ids."""
        words, captions = known.words, known.captions
        view, boxes, kept, _ = random_view(pixels, known.boxes, self._augment, rng, self._view)
        picked = rng.permutation(len(boxes))[: self._count]
        zoomed = self._augment.zoom > 0  # the record's captions are true of the whole image
        if len(kept) and (zoomed or not captions):
            caption = caption_of_view(words, kept, rng)
        else:
            caption = captions[rng.integers(len(captions))]  # no view is without all regions
        return {
            "pixel_values": view,
            "input_ids": self.tokens(caption),
            "boxes": boxes[picked].tensor(),
            "region_input_ids": [self.tokens(words[kept[i]]) for i in picked],
        }

    def collate(self, items: Sequence[dict]) -> dict[str, Tensor]:
        """A batch for `ClocObjective.forward`."""
        ids, mask = self.tokens.pad([item["input_ids"] for item in items])
        region_ids, region_mask = self.tokens.pad([row for item in items for row in item["region_input_ids"]])
        counts = [len(item["boxes"]) for item in items]
        boxes = torch.zeros(len(items), max(1, *counts), 4)
        for row, item in zip(boxes, items, strict=True):
            row[: len(item["boxes"])] = item["boxes"]
        return {
            "pixel_values": torch.stack([item["pixel_values"] for item in items]),
            "input_ids": ids,
            "attention_mask": mask,
            "boxes": boxes,
            "region_counts": torch.tensor(counts),
            "region_input_ids": region_ids,
            "region_attention_mask": region_mask,
        }
