"""The items of UMG-CLIP's stage 0: pixels, a caption, tags, and regions with a text, tags and a mask each.

The paper matches captions and tags at the level of the image, the region and the pixel (arXiv 2401.06397); which of
them an item takes, and how many regions, is not in what is known of it: we take what the records have.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..mllm.boxes import Boxes, ImageFrame
from .augment import AugmentConfig, View, random_view
from .mask_coverage import patch_coverage
from .pretrain_data import CaptionTokens, caption_of_view, region_text
from .records import Record, Region
from .tag_bank import TagBank, tags_of
from .tag_loss import NO_TAG


class TaggedImage(NamedTuple):
    """What is known of one image. boxes: `(R, 4)` in input pixels, of `regions`; texts, tags: of each of these."""

    record: Record
    frame: ImageFrame
    boxes: Boxes
    regions: list[Region]
    texts: list[list[str]]
    tags: list[list[int]]
    own_tags: list[int]


class TaggedRegionItems:
    """Images with whatever they have of caption, tags and regions, drawn anew each time.

    Regions: at most `regions_per_image` random ones of those in the view that have a text (`region_text`). The text of
    one is drawn from it and the region's captions. Its mask, if the record has one, is given as the share of each
    patch of the view; where there is none the shares are 0.
    Caption: as in `GroundedCaptionItems`. Tags of the image: the record's and those of all regions in the view;
    without the record's when views are zoomed and show a region with tags, as those are true of the whole image.
    An image that has nothing of all this is left out.

    patch_size: of the tower. view: pixels of the square the tower gets; the whole input when absent.
    """

    nothing = "no record has captions, tags or regions with words; the umg_clip objective needs them"

    def __init__(
        self,
        tokens: CaptionTokens,
        bank: TagBank,
        patch_size: int,
        regions_per_image: int,
        augment: AugmentConfig,
        view: int | None = None,
    ):
        self.tokens, self.bank = tokens, bank
        self._count, self._patch_size = regions_per_image, patch_size
        self._augment, self._view = augment, view

    def prepare(self, record: Record, frame: ImageFrame) -> TaggedImage | None:
        """Captions, tags and regions with words or captions; None when there is nothing of it."""
        texts = [
            list(dict.fromkeys(text for text in (region_text(region), *region.captions) if text))
            for region in record.regions
        ]
        tags = [self.bank.ids(tags_of(region)) for region in record.regions]
        own_tags = self.bank.ids(record.tags)
        usable = [i for i in range(len(record.regions)) if texts[i]]  # whatever has tags has words
        boxes, kept = frame.to_input(Boxes([record.regions[i].box_xyxy for i in usable]))
        usable = [usable[i] for i in kept]
        if not (record.captions or own_tags or usable):
            return None
        return TaggedImage(
            record,
            frame,
            boxes,
            [record.regions[i] for i in usable],
            [texts[i] for i in usable],
            [tags[i] for i in usable],
            own_tags,
        )

    def item(self, pixels: Tensor, known: TaggedImage, rng: np.random.Generator) -> dict[str, Any]:
        """A random view of uint8 `pixels (3, S, S)`: `pixel_values` uint8 (3, view, view); `input_ids` the token ids of
        its caption, None without one; `image_tags` numbers of tags; `boxes` (R, 4) float32 xyxy in its pixels, R from 0
        on; `masks` (R, rows, columns) shares of its patches; `region_input_ids`, `region_tags` R lists."""
        view = random_view(pixels, known.boxes, self._augment, rng, self._view)
        picked = rng.permutation(len(view.boxes))[: self._count]
        sources = view.kept[picked].tolist()
        caption = self._caption(known, view.kept, rng)
        texts = [known.texts[i][rng.integers(len(known.texts[i]))] for i in sources]
        return {
            "pixel_values": view.pixels,
            "input_ids": None if caption is None else self.tokens(caption),
            "image_tags": self._image_tags(known, view.kept),
            "boxes": view.boxes[picked].tensor(),
            "masks": self._masks(known, view, sources),
            "region_input_ids": [self.tokens(text) for text in texts],
            "region_tags": [known.tags[i] for i in sources],
        }

    def _caption(self, image: TaggedImage, kept: np.ndarray, rng: np.random.Generator) -> str | None:
        captions = image.record.captions
        zoomed = self._augment.zoom > 0  # the record's captions are true of the whole image
        if len(kept) and (zoomed or not captions):
            return caption_of_view([texts[0] for texts in image.texts], kept, rng)
        return captions[rng.integers(len(captions))] if captions else None

    def _image_tags(self, image: TaggedImage, kept: np.ndarray) -> list[int]:
        in_view = {tag for i in kept.tolist() for tag in image.tags[i]}
        if not (in_view and self._augment.zoom > 0):
            in_view.update(image.own_tags)
        return sorted(in_view)

    def _masks(self, image: TaggedImage, view: View, sources: list[int]) -> Tensor:
        width, height = (side // self._patch_size for side in view.frame.input_size)
        shares = torch.zeros(len(sources), height, width)
        for number, source in enumerate(sources):
            mask = image.regions[source].mask
            if mask is not None:
                frame = image.frame.then(view.frame)
                shares[number] = torch.from_numpy(patch_coverage(mask, frame, self._patch_size))
        return shares

    def collate(self, items: Sequence[dict]) -> dict[str, Tensor]:
        """A batch for `UmgClipObjective.forward`. Its `tag_seed` is drawn from torch's global generator, which the
        training engine seeds for every batch."""
        most = max(1, *(len(item["boxes"]) for item in items))
        captions = [item["input_ids"] for item in items]
        ids, mask = self.tokens.pad([row for row in captions if row is not None])
        region_ids, region_mask = self.tokens.pad([row for item in items for row in item["region_input_ids"]])
        boxes = torch.zeros(len(items), most, 4)
        masks = torch.zeros(len(items), most, *items[0]["masks"].shape[1:])
        for row, item in enumerate(items):
            count = len(item["boxes"])
            boxes[row, :count], masks[row, :count] = item["boxes"], item["masks"]
        region_tags = [row + [[]] * (most - len(row)) for row in (item["region_tags"] for item in items)]
        return {
            "pixel_values": torch.stack([item["pixel_values"] for item in items]),
            "input_ids": ids,
            "attention_mask": mask,
            "captioned": torch.tensor([row is not None for row in captions]),
            "image_tags": _padded([item["image_tags"] for item in items]),
            "boxes": boxes,
            "masks": masks,
            "region_counts": torch.tensor([len(item["boxes"]) for item in items]),
            "region_input_ids": region_ids,
            "region_attention_mask": region_mask,
            "region_tags": _padded([tags for rows in region_tags for tags in rows]).unflatten(0, (len(items), most)),
            "tag_seed": torch.randint(1 << 62, ()),
        }


def _padded(rows: Sequence[Sequence[int]]) -> Tensor:
    """`(n, longest, at least 1)` int64, padded with NO_TAG."""
    width = max(1, *map(len, rows))
    return torch.tensor([[*row, *[NO_TAG] * (width - len(row))] for row in rows])
