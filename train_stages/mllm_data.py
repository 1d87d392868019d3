"""Region records -> batches for RegionLlava."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from ..mllm.boxes import Boxes, ImageFrame, box_format
from ..mllm.draw import OVERLAY_COLORS, draw_boxes
from ..mllm.processing import RegionLlavaProcessor
from ..vision_towers import pad_boxes
from ..vision_towers.errors import UserError
from .bad_records import BadRecord, name_bad
from .conversation_ids import IGNORED, conversation_ids
from .conversations import render_turns, sample_conversation
from .pixels import PixelCache
from .record_io import RecordSet, load_record_image
from .records import Record


@dataclass(frozen=True)
class Sample:
    """One conversation about one picture.

    pixels: uint8 `(3, H, W)` in the input frame. boxes: float32 `(R, 4)` in input pixels, in placeholder order.
    """

    ids: list[int]
    labels: list[int]
    pixels: np.ndarray
    boxes: torch.Tensor


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
        self.format = box_format(processor.box_format)
        self.pictures: RecordSet | PixelCache = records
        unreadable: list[BadRecord] = []
        # With row ends inputs have many sizes, and with overlay they are drawn on: no array of pixels can hold them.
        if not processor.row_end and processor.region_prompt != "overlay":
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
        row = self.usable[index]
        record = self.pictures.records[row]
        frame = self.processor.frame((record.width, record.height))
        # `random` is seeded for this very item by the engine.
        turns = render_turns(
            sample_conversation(record, random.Random(random.random()), self.mix, self.turns), self.format, frame
        )
        ids, labels, count = conversation_ids(self.processor, turns, frame, self.max_tokens)
        regions = Boxes([box for turn in turns[:count] for box in turn.boxes])
        boxes = self.processor.to_input(regions, frame) if self.processor.embeds_regions else torch.zeros(0, 4)
        return Sample(ids, labels, self._pixels(row, record, regions, frame), boxes)

    def _pixels(self, row: int, record: Record, regions: Boxes, frame: ImageFrame) -> np.ndarray:
        if isinstance(self.pictures, PixelCache):
            return self.pictures.pixels[row]
        picture = load_record_image(self.pictures.root, record)
        if self.processor.region_prompt == "overlay":
            picture = draw_boxes(picture, regions, OVERLAY_COLORS)
        return np.asarray(self.processor.fit(picture)[0]).transpose(2, 0, 1)


def collate_samples(samples: Sequence[Sample], *, processor: RegionLlavaProcessor) -> dict[str, torch.Tensor]:
    """Pad on the right; `boxes` and `region_counts` are left out when no sample has a region.

    Without `attention_mask`: no token looks at what comes after it, so padding is seen by padding alone, and attention
    that is causal and nothing else is faster.
    """
    if len({sample.pixels.shape for sample in samples}) > 1:
        raise UserError("pictures of one batch have several input sizes; set train.batch_size=1 with model.row_end.")
    length = max(len(sample.ids) for sample in samples)
    pad = processor.tokenizer.pad_token_id
    shape = (len(samples), length)
    batch = {
        "input_ids": torch.full(shape, pad),
        "labels": torch.full(shape, IGNORED),
        "pixel_values": processor.normalise(np.stack([sample.pixels for sample in samples])),
    }
    for row, sample in enumerate(samples):
        end = len(sample.ids)
        batch["input_ids"][row, :end] = torch.tensor(sample.ids)
        batch["labels"][row, :end] = torch.tensor(sample.labels)
    if any(len(sample.boxes) for sample in samples):
        batch["boxes"], batch["region_counts"] = pad_boxes([sample.boxes for sample in samples])
    return batch
