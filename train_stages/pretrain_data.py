"""The items of RICE and CLIP: pixels with labelled boxes or with a caption, and their batches."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..mllm.boxes import Boxes, ImageFrame
from ..vision_towers.errors import UserError
from .augment import AugmentConfig, random_view
from .conversations import region_words
from .records import Record, Region
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


def labelled_regions(
    record: Record, frame: ImageFrame, objects: ObjectClasses, texts: TextClasses | None
) -> LabelledRegions | None:
    """The regions of a record that have a label, None when there is none."""
    object_ids = np.asarray(objects.labels(record), dtype=np.int64)
    token_sets = texts.labels(record) if texts else [[] for _ in record.regions]
    keep = [i for i in range(len(record.regions)) if object_ids[i] != NO_CLASS or token_sets[i]]
    boxes, kept = frame.to_input(Boxes([record.regions[i].box_xyxy for i in keep]))
    keep = [keep[i] for i in kept]
    return LabelledRegions(boxes, object_ids[keep], [token_sets[i] for i in keep]) if keep else None


@dataclass(frozen=True)
class RegionItems:
    """Images with exactly `regions_per_image` labelled regions each.

    view: pixels of the square the tower gets; the whole input when absent.
    """

    objects: ObjectClasses
    texts: TextClasses | None
    regions_per_image: int
    augment: AugmentConfig
    view: int | None = None
    nothing = "no image has a labelled region; check data.object_labels and the records"

    def prepare(self, record: Record, frame: ImageFrame) -> LabelledRegions | None:
        """The regions that have a label, boxes in pixels of the input; None when there is none."""
        return labelled_regions(record, frame, self.objects, self.texts)

    def item(self, pixels: Tensor, known: LabelledRegions, rng: np.random.Generator) -> dict[str, Any]:
        """A random view of uint8 `pixels (3, S, S)` and N of the regions in it, some of them more than once where there
        are fewer: `pixel_values` uint8 (3, view, view), `boxes` (N, 4) float32 xyxy in its pixels, `object_labels` (N,)
        int64, `ocr_labels` N lists of token classes."""
        view, boxes, kept, _ = random_view(pixels, known.boxes, self.augment, rng, self.view)
        picked = sample_regions(len(boxes), self.regions_per_image, rng)
        source = kept[picked]
        return {
            "pixel_values": view,
            "boxes": boxes[picked].tensor(),
            "object_labels": torch.from_numpy(known.objects[source]),
            "ocr_labels": [known.texts[i] for i in source],
        }

    def collate(self, items: Sequence[dict]) -> dict[str, Tensor]:
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


class CaptionItems:
    """Images with a caption each, drawn anew each time.

    captions: "image" draws one of the record's captions; "visible" names one to `MAX_NAMED` of the regions in the view
        by their words (`region_words`), in random order, so that a caption is true of a zoomed view too.
    view: pixels of the square the tower gets; the whole input when absent.
    Raises UserError when the tokenizer lacks a token that the objective needs.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_tokens: int,
        augment: AugmentConfig,
        captions: CaptionSource = "image",
        view: int | None = None,
    ):
        self.tokens = CaptionTokens(tokenizer, max_tokens)
        self._augment, self._view = augment, view
        self._from_regions = captions == "visible"
        what = "no region of the records has words" if self._from_regions else "no record has captions"
        self.nothing = f"{what}; the clip objective needs them"

    def prepare(self, record: Record, frame: ImageFrame) -> tuple[Boxes, list[str]] | None:
        """What captions are made of: regions with words, `(R, 4)` in pixels of the input, and the words; or no box, and
        the record's captions. None when there are no texts."""
        found = named_regions(record, frame) if self._from_regions else (Boxes.empty(), record.captions)
        return found if found[1] else None

    def item(self, pixels: Tensor, known: tuple[Boxes, list[str]], rng: np.random.Generator) -> dict[str, Any]:
        """A random view of uint8 `pixels (3, S, S)` and a caption: `pixel_values` uint8 (3, view, view), `input_ids` a
        list of token ids."""
        boxes, texts = known
        view, _, kept, _ = random_view(pixels, boxes, self._augment, rng, self._view)
        caption = caption_of_view(texts, kept, rng) if self._from_regions else texts[rng.integers(len(texts))]
        return {"pixel_values": view, "input_ids": self.tokens(caption)}

    def collate(self, items: Sequence[dict]) -> dict[str, Tensor]:
        """A batch for `ClipObjective.forward`, padded on the right."""
        ids, mask = self.tokens.pad([item["input_ids"] for item in items])
        return {
            "pixel_values": torch.stack([item["pixel_values"] for item in items]),
            "input_ids": ids,
            "attention_mask": mask,
        }


def region_text(region: Region) -> str:
    """What a region is called in training: its words (`region_words`), or of one without, such as `label vesl` writes,
    its first caption or phrase; "" where it has nothing. Phrases of a region with words often say where it is."""
    return region_words(region) or next(iter([*region.captions, *region.texts]), "")


def named_regions(record: Record, frame: ImageFrame) -> tuple[Boxes, list[str]]:
    """The regions that have a text (`region_text`), as boxes in input pixels, and the texts."""
    words = [region_text(region) for region in record.regions]
    usable = [i for i, text in enumerate(words) if text]
    boxes, kept = frame.to_input(Boxes([record.regions[i].box_xyxy for i in usable]))
    return boxes, [words[usable[i]] for i in kept]
