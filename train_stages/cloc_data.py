"""The items of CLOC's stage 0: pixels, a caption, and a few regions with a text each (arXiv 2410.02746, Sec. 3.4)."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from ..mllm.boxes import Boxes
from ..vision_towers.errors import UserError
from .augment import AugmentConfig, random_view
from .pixels import PixelCache
from .pretrain_data import CaptionTokens, caption_of_view, named_regions, pixels_tensor, seeded_generator


class GroundedCaptionDataset(Dataset):
    """Images with a caption and at most `regions_per_image` regions with words, drawn anew each time.

    The caption names what is in the view (as `CaptionDataset` does with "visible") or is one of the record's own. An
    image without words for any region takes part with its caption alone; one without either is left out.

    view: pixels of the square the tower gets; as in the cache when absent.
    Raises UserError when no image is left or the tokenizer lacks a token that the objective needs.
    """

    def __init__(
        self,
        cache: PixelCache,
        tokenizer: PreTrainedTokenizerBase,
        max_tokens: int,
        regions_per_image: int,
        augment: AugmentConfig,
        view: int | None = None,
    ):
        self.tokens = CaptionTokens(tokenizer, max_tokens)
        self._pixels, self._count = cache.pixels, regions_per_image
        self._augment, self._view = augment, view
        found = [named_regions(record, frame) for record, frame in zip(cache.records, cache.frames, strict=True)]
        captions = [record.captions for record in cache.records]
        self._rows = [row for row, (_, words) in enumerate(found) if words or captions[row]]
        if not self._rows:
            raise UserError("no record has captions or regions with words; the cloc objective needs them")
        self._boxes: list[Boxes] = [found[row][0] for row in self._rows]
        self._words: list[list[str]] = [found[row][1] for row in self._rows]
        self._captions: list[list[str]] = [captions[row] for row in self._rows]

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def regions(self) -> int:
        """How many regions have words."""
        return sum(map(len, self._words))

    def __getitem__(self, index: int) -> dict:
        rng = seeded_generator()
        words, captions = self._words[index], self._captions[index]
        whole = pixels_tensor(self._pixels[self._rows[index]])
        pixels, boxes, kept, _ = random_view(whole, self._boxes[index], self._augment, rng, self._view)
        picked = rng.permutation(len(boxes))[: self._count]
        zoomed = self._augment.zoom > 0  # the record's captions are true of the whole image
        if len(kept) and (zoomed or not captions):
            caption = caption_of_view(words, kept, rng)
        else:
            caption = captions[rng.integers(len(captions))] if captions else ", ".join(words)
        return {
            "pixel_values": pixels,
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
