"""The items of stage 0: pixels with labelled boxes (RICE) or with a caption (CLIP), and their batches."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from ..mllm.boxes import Boxes, ImageFrame
from ..vision_towers.errors import UserError
from .augment import AugmentConfig, random_view
from .conversations import region_words
from .pixels import PixelCache
from .records import Record
from .region_labels import NO_CLASS, ObjectClasses, TextClasses
from .region_sampling import sample_regions

CaptionSource = Literal["image", "visible"]
MAX_NAMED = 3  # regions that a caption of a view names at most


@dataclass(frozen=True)
class LabelledRegions:
    """The regions of one image that have a label: boxes `(R, 4)` in input pixels, an object class each (NO_CLASS =
    none), and the token classes of their text (empty = none)."""

    boxes: Boxes
    objects: np.ndarray
    texts: list[list[int]]


def label_regions(
    cache: PixelCache, objects: ObjectClasses, texts: TextClasses | None
) -> tuple[list[int], list[LabelledRegions]]:
    """The rows of `cache` that have a labelled region, and those regions. Regions without any label are left out."""
    rows, labelled = [], []
    for row, (record, frame) in enumerate(zip(cache.records, cache.frames, strict=True)):
        object_ids = np.asarray(objects.labels(record), dtype=np.int64)
        token_sets = texts.labels(record) if texts else [[] for _ in record.regions]
        keep = [i for i in range(len(record.regions)) if object_ids[i] != NO_CLASS or token_sets[i]]
        boxes, kept = frame.to_input(Boxes([record.regions[i].box_xyxy for i in keep]))
        keep = [keep[i] for i in kept]
        if keep:
            rows.append(row)
            labelled.append(LabelledRegions(boxes, object_ids[keep], [token_sets[i] for i in keep]))
    return rows, labelled


class RegionDataset(Dataset):
    """Images with exactly `regions_per_image` labelled regions each; images without a labelled region are left out.

    view: pixels of the square the tower gets; as in the cache when absent.
    Draws from numpy's global generator, which the training engine seeds for every item and epoch.
    Raises UserError when no image is left.
    """

    def __init__(
        self,
        cache: PixelCache,
        objects: ObjectClasses,
        texts: TextClasses | None,
        regions_per_image: int,
        augment: AugmentConfig,
        view: int | None = None,
    ):
        self._pixels, self._count = cache.pixels, regions_per_image
        self._augment, self._view = augment, view
        self._rows, self.labelled = label_regions(cache, objects, texts)
        if not self._rows:
            raise UserError("no image has a labelled region; check data.object_labels and the records")

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict:
        rng = seeded_generator()
        regions = self.labelled[index]
        whole = pixels_tensor(self._pixels[self._rows[index]])
        pixels, boxes, kept, _ = random_view(whole, regions.boxes, self._augment, rng, self._view)
        picked = sample_regions(len(boxes), self._count, rng)
        source = kept[picked]
        return {
            "pixel_values": pixels,
            "boxes": boxes[picked].tensor(),
            "object_labels": torch.from_numpy(regions.objects[source]),
            "ocr_labels": [regions.texts[i] for i in source],
        }


def collate_regions(items: Sequence[dict]) -> dict[str, Tensor]:
    """A batch for `RiceObjective.forward`; token sets are padded with -1 to the longest, at least 1."""
    width = max(1, *(len(ids) for item in items for ids in item["ocr_labels"]))
    ocr = [[ids + [NO_CLASS] * (width - len(ids)) for ids in item["ocr_labels"]] for item in items]
    boxes = torch.stack([item["boxes"] for item in items])
    return {
        "pixel_values": torch.stack([item["pixel_values"] for item in items]),
        "boxes": boxes,
        "region_counts": torch.full((len(items),), boxes.shape[1]),
        "object_labels": torch.stack([item["object_labels"] for item in items]),
        "ocr_labels": torch.tensor(ocr),
    }


class CaptionTokens:
    """Texts as token ids that end in the tokenizer's end token, at most `max_tokens` of them.

    framed: with the tokens that the tokenizer itself puts around a text, such as CLIP's begin token. length: to which
    every text is padded; that of the longest in the batch when absent.
    Raises UserError when the tokenizer has no end or no padding token.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, max_tokens: int, *, framed: bool = False, length: int | None = None
    ):
        end_id, pad_id = tokenizer.eos_token_id, tokenizer.pad_token_id
        if not isinstance(end_id, int) or not isinstance(pad_id, int):
            raise UserError("the tokenizer has no end or no padding token; the objective needs both")
        self.end_id, self.pad_id = end_id, pad_id
        self._tokenizer, self._max_tokens = tokenizer, max_tokens
        self._framed, self._length = framed, length

    def __call__(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=self._framed)["input_ids"]  # pyright: ignore
        if self._framed and ids[-1:] == [self.end_id]:
            ids = ids[:-1]
        return [*ids[: self._max_tokens - 1], self.end_id]

    def pad(self, rows: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
        """Ids and attention mask, `(n, length)` int64, padded on the right."""
        width = self._length or max((len(row) for row in rows), default=1)
        ids = torch.full((len(rows), width), self.pad_id)
        mask = torch.zeros(len(rows), width, dtype=torch.long)
        for number, row in enumerate(rows):
            ids[number, : len(row)] = torch.tensor(row)
            mask[number, : len(row)] = 1
        return ids, mask


def caption_of_view(words: list[str], kept: Sequence[int] | np.ndarray, rng: np.random.Generator) -> str:
    """Names one to `MAX_NAMED` of the regions `kept`, in random order."""
    count = rng.integers(1, min(MAX_NAMED, len(kept)) + 1)
    return ", ".join(words[i] for i in rng.permutation(np.asarray(kept))[:count].tolist())


class CaptionDataset(Dataset):
    """Images with a caption each, drawn anew each time; images without one are left out.

    captions: "image" draws one of the record's captions; "visible" names one to `MAX_NAMED` of the regions in the view
        by their words (`region_words`), in random order, so that a caption is true of a zoomed view too.
    view: pixels of the square the tower gets; as in the cache when absent.
    Raises UserError when no image has a caption or the tokenizer lacks a token that the objective needs.
    """

    def __init__(
        self,
        cache: PixelCache,
        tokenizer: PreTrainedTokenizerBase,
        max_tokens: int,
        augment: AugmentConfig,
        captions: CaptionSource = "image",
        view: int | None = None,
    ):
        self.tokens = CaptionTokens(tokenizer, max_tokens)
        self._pixels, self._augment, self._view = cache.pixels, augment, view
        self._from_regions = captions == "visible"
        named = [named_regions(record, frame) for record, frame in zip(cache.records, cache.frames, strict=True)]
        texts = [words for _, words in named] if self._from_regions else [record.captions for record in cache.records]
        self._rows = [row for row, found in enumerate(texts) if found]
        if not self._rows:
            what = "no region of the records has words" if self._from_regions else "no record has captions"
            raise UserError(f"{what}; the clip objective needs them")
        self._texts = [texts[row] for row in self._rows]
        self._boxes = [named[row][0] if self._from_regions else Boxes.empty() for row in self._rows]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict:
        rng = seeded_generator()
        texts, whole = self._texts[index], pixels_tensor(self._pixels[self._rows[index]])
        pixels, _, kept, _ = random_view(whole, self._boxes[index], self._augment, rng, self._view)
        caption = caption_of_view(texts, kept, rng) if self._from_regions else texts[rng.integers(len(texts))]
        return {"pixel_values": pixels, "input_ids": self.tokens(caption)}

    def collate(self, items: Sequence[dict]) -> dict[str, Tensor]:
        """A batch for `ClipObjective.forward`, padded on the right."""
        ids, mask = self.tokens.pad([item["input_ids"] for item in items])
        return {
            "pixel_values": torch.stack([item["pixel_values"] for item in items]),
            "input_ids": ids,
            "attention_mask": mask,
        }


def named_regions(record: Record, frame: ImageFrame) -> tuple[Boxes, list[str]]:
    """The regions that have words, as boxes in input pixels, and the words."""
    words = [region_words(region) for region in record.regions]
    usable = [i for i, text in enumerate(words) if text]
    boxes, kept = frame.to_input(Boxes([record.regions[i].box_xyxy for i in usable]))
    return boxes, [words[usable[i]] for i in kept]


def seeded_generator() -> np.random.Generator:
    return np.random.default_rng(np.random.randint(0, 2**32, size=4, dtype=np.uint64))


def pixels_tensor(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(pixels))  # a copy: the memory map is read-only
