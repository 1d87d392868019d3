"""Region records -> batches for RegionLlava."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from ..mllm.boxes import Boxes, ImageFrame, box_format
from ..mllm.draw import OVERLAY_COLORS, draw_boxes
from ..mllm.processing import RegionLlavaProcessor
from ..vision_towers import pad_boxes
from ..vision_towers.errors import UserError
from .bad_records import BadRecord, name_bad
from .conversation_ids import IGNORED, TooLong, conversation_ids
from .conversation_kinds import Turn
from .conversations import RenderedTurn, render_turns, sample_conversation
from .pixels import PixelCache
from .record_io import RecordSet, load_record_image
from .records import Record

_DRAWS = 8  # of turns about a picture, until one fits


class KeptFeatures(NamedTuple):
    """Of one picture. image: `(tokens, width)` before the projector. regions: `(R, region_dim)` of its boxes."""

    image: torch.Tensor
    regions: torch.Tensor


@dataclass(frozen=True)
class Sample:
    """One conversation about one picture, or about none.

    pixels: uint8 `(3, H, W)` in the input frame; None without a picture, or when `kept` stands for it. boxes: float32
    `(R, 4)` in input pixels, in placeholder order. kept: what the tower made of picture and boxes. size: width and
    height of the original. With tiles pixels are uint8 `(views, 3, H, W)`.
    """

    ids: list[int]
    labels: list[int]
    pixels: np.ndarray | None
    boxes: torch.Tensor
    kept: KeptFeatures | None = None
    size: tuple[int, int] = (0, 0)


class ConversationDataset(Dataset):
    """Each item draws new turns about its record; the engine seeds the draw by (seed, epoch, index).

    `summary` says what was read, what was bad, and how many records have nothing to ask about.

    Raises:
        UserError: no record gives a single turn.
    """

    def __init__(
        self,
        records: RecordSet,
        processor: RegionLlavaProcessor,
        mix: Mapping[str, float],
        *,
        turns: int,
        max_tokens: int,
        cache_dir: Path | None,
    ):
        self.processor, self.mix, self.turns, self.max_tokens = processor, mix, turns, max_tokens
        self.pictures: RecordSet | PixelCache = records
        self._too_long: dict[int, BadRecord] = {}  # index -> why no question fits; each worker counts its own
        unreadable: list[BadRecord] = []
        # With row ends inputs have many sizes, tiles are many inputs, and with overlay they are drawn on: no array of
        # pixels can hold them.
        if processor.letterboxed and processor.region_prompt != "overlay":
            self.pictures = PixelCache.build(records, processor.image_size, cache_dir, fill=processor.fill_colour)
            unreadable = self.pictures.bad
        self.usable = [row for row, record in enumerate(self.pictures.records) if self._has_turns(record)]
        if not self.usable:
            raise UserError(
                f"no record of {records.path} gives a question of the kinds in data.mix ({', '.join(mix)})."
            )
        without = len(self.pictures.records) - len(self.usable)
        self.summary = records.summary()
        self.summary += f"; images that cannot be read: {name_bad(unreadable)}" if unreadable else ""
        self.summary += f"; {without} with nothing to ask about" if without else ""

    def _has_turns(self, record: Record) -> bool:
        return bool(sample_conversation(record, random.Random(0), self.mix, 1))

    def __len__(self) -> int:
        return len(self.usable)

    def __getitem__(self, index: int) -> Sample:
        """Raises UserError when no question fits for more than max(5, 1 %) of the records, or for all."""
        while True:
            try:
                return self._sample(self.usable[index])
            except TooLong as error:
                self._refuse_too_many(index, error)
                index = (index + 1) % len(self.usable)  # the next one takes its place

    def _refuse_too_many(self, index: int, error: TooLong) -> None:
        record = self.pictures.records[self.usable[index]]
        self._too_long.setdefault(index, BadRecord(record.image, str(error)))
        if len(self._too_long) > max(5, len(self.usable) / 100) or len(self._too_long) == len(self.usable):
            raise UserError(
                f"no question about {len(self._too_long)} of {len(self.usable)} records fits into data.max_tokens: "
                f"{name_bad(list(self._too_long.values()))}"
            )

    def _sample(self, row: int) -> Sample:
        record = self.pictures.records[row]
        frame = self.processor.frame((record.width, record.height))
        # `random` is seeded for this very item by the engine.
        turns, ids, labels, count = fitting_turns(
            lambda: sample_conversation(record, random.Random(random.random()), self.mix, self.turns),
            self.processor,
            frame,
            self.max_tokens,
        )
        regions = Boxes([box for turn in turns[:count] for box in turn.boxes])
        boxes = self.processor.to_input(regions, frame) if self.processor.embeds_regions else torch.zeros(0, 4)
        return Sample(ids, labels, self._pixels(row, record, regions, frame), boxes, size=frame.original_size)

    def _pixels(self, row: int, record: Record, regions: Boxes, frame: ImageFrame) -> np.ndarray:
        if isinstance(self.pictures, PixelCache):
            return self.pictures.pixels[row]
        picture = load_record_image(self.pictures.root, record)
        if self.processor.region_prompt == "overlay":
            picture = draw_boxes(picture, regions, OVERLAY_COLORS)
        return self.processor.pixels(picture)


def fitting_turns(
    draw: Callable[[], list[Turn]], processor: RegionLlavaProcessor, frame: ImageFrame, max_tokens: int
) -> tuple[list[RenderedTurn], list[int], list[int], int]:
    """Turns about a picture, and their `conversation_ids`. Where not even the first turn fits, others are drawn.

    Raises:
        TooLong: of the last of `_DRAWS`.
    """
    for left in reversed(range(_DRAWS)):
        turns = render_turns(draw(), box_format(processor.box_format), frame)
        try:
            return turns, *conversation_ids(processor, turns, frame, max_tokens)
        except TooLong:
            if not left:
                raise
    raise AssertionError


def collate_samples(
    samples: Sequence[Sample],
    *,
    processor: RegionLlavaProcessor,
    pictures: Callable[[Sequence[Sample]], dict[str, torch.Tensor]] | None = None,
) -> dict[str, torch.Tensor]:
    """Pad on the right. pictures: what the model gets for them; `batch_pictures` when absent.

    Without `attention_mask`: no token looks at what comes after it, so padding is seen by padding alone, and attention
    that is causal and nothing else is faster.
    """
    length = max(len(sample.ids) for sample in samples)
    shape = (len(samples), length)
    batch = {"input_ids": torch.full(shape, pad_id(processor)), "labels": torch.full(shape, IGNORED)}
    for row, sample in enumerate(samples):
        end = len(sample.ids)
        batch["input_ids"][row, :end] = torch.tensor(sample.ids)
        batch["labels"][row, :end] = torch.tensor(sample.labels)
    return batch | (batch_pictures(samples, processor) if pictures is None else pictures(samples))


def batch_pictures(samples: Sequence[Sample], processor: RegionLlavaProcessor) -> dict[str, torch.Tensor]:
    """`pixel_values` (and with tiles `image_sizes`) of the samples that have a picture; `boxes` and `region_counts` are
    left out when no sample has a region.

    Raises:
        UserError: their input sizes differ.
    """
    shown = [sample for sample in samples if sample.pixels is not None]
    if processor.row_end and len({sample.pixels.shape for sample in shown if sample.pixels is not None}) > 1:
        raise UserError("pictures of one batch have several input sizes; set train.batch_size=1 with model.row_end.")
    batch: dict[str, torch.Tensor] = {}
    if shown:
        pixels = [sample.pixels for sample in shown if sample.pixels is not None]
        batch |= processor.picture_inputs(pixels, [sample.size for sample in shown])
    if any(len(sample.boxes) for sample in shown):
        batch["boxes"], batch["region_counts"] = pad_boxes([sample.boxes for sample in shown])
    return batch


def pad_id(processor: RegionLlavaProcessor) -> int:
    """What fills a batch. Some tokenizers have nothing for it; it is never learned, so any word will do."""
    tokenizer = processor.tokenizer
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(token for token in known if token is not None)
