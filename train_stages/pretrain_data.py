"""The items of stage 0: pixels with labelled boxes (RICE) or with a caption (CLIP), and their batches."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from ..mllm.boxes import Boxes
from ..vision_towers.errors import UserError
from .augment import AugmentConfig, random_view
from .pixels import PixelCache
from .region_labels import NO_CLASS, ObjectClasses, TextClasses
from .region_sampling import sample_regions


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
    ):
        self._pixels, self._count, self._augment = cache.pixels, regions_per_image, augment
        self._rows, self.labelled = label_regions(cache, objects, texts)
        if not self._rows:
            raise UserError("no image has a labelled region; check data.object_labels and the records")

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict:
        rng = _generator()
        regions = self.labelled[index]
        pixels, boxes, kept = random_view(_tensor(self._pixels[self._rows[index]]), regions.boxes, self._augment, rng)
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


class CaptionDataset(Dataset):
    """Images with one of their captions, drawn anew each time; images without a caption are left out.

    Raises UserError when no image has a caption or the tokenizer lacks a token that the objective needs.
    """

    def __init__(self, cache: PixelCache, tokenizer: PreTrainedTokenizerBase, max_tokens: int, augment: AugmentConfig):
        end_id, pad_id = tokenizer.eos_token_id, tokenizer.pad_token_id
        if not isinstance(end_id, int) or not isinstance(pad_id, int):
            raise UserError("the tokenizer has no end or no padding token; the clip objective needs both")
        self._pixels, self._augment = cache.pixels, augment
        self._rows = [row for row, record in enumerate(cache.records) if record.captions]
        if not self._rows:
            raise UserError("no record has captions; the clip objective needs them")
        self.end_id, self.pad_id = end_id, pad_id
        self._captions: list[list[list[int]]] = []
        for row in self._rows:
            encoded = tokenizer(cache.records[row].captions, add_special_tokens=False)["input_ids"]
            self._captions.append([[*ids[: max_tokens - 1], end_id] for ids in encoded])

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict:
        rng = _generator()
        pixels, _, _ = random_view(_tensor(self._pixels[self._rows[index]]), Boxes.empty(), self._augment, rng)
        captions = self._captions[index]
        return {"pixel_values": pixels, "input_ids": captions[rng.integers(len(captions))]}

    def collate(self, items: Sequence[dict]) -> dict[str, Tensor]:
        """A batch for `ClipObjective.forward`, padded on the right."""
        width = max(len(item["input_ids"]) for item in items)
        lengths = torch.tensor([len(item["input_ids"]) for item in items])
        return {
            "pixel_values": torch.stack([item["pixel_values"] for item in items]),
            "input_ids": torch.tensor(
                [item["input_ids"] + [self.pad_id] * (width - len(item["input_ids"])) for item in items]
            ),
            "attention_mask": (torch.arange(width)[None] < lengths[:, None]).long(),
        }


def _generator() -> np.random.Generator:
    return np.random.default_rng(np.random.randint(0, 2**32, size=4, dtype=np.uint64))


def _tensor(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(pixels))  # a copy: the memory map is read-only
