"""One thing to talk about -> token ids, labels and boxes, before its picture is decoded."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch

from ..mllm.boxes import Boxes
from ..mllm.draw import OVERLAY_COLORS, draw_boxes
from ..mllm.processing import RegionLlavaProcessor
from ..mllm.prompts import IMAGE_TOKEN, REGION_TOKEN
from ..vision_towers.errors import UserError
from .conversation_ids import IGNORED, TooLong, conversation_ids
from .conversation_kinds import Turn
from .conversations import RenderedTurn, sample_conversation
from .mllm_data import Sample, fitting_turns
from .picture_file import PictureFile
from .records import Record

NO_FRAME = (1, 1)  # a picture whose size is of no importance: the input is a square, and nothing speaks of its boxes


@dataclass(frozen=True)
class Example:
    """What a source holds: a region record that turns are drawn from, or a conversation that is given.

    name: for messages. mix, most_turns: of a record, see `sample_conversation`. turns: (question, answer), system:
    instructions, of a conversation.
    """

    name: str
    picture: PictureFile | None
    record: Record | None = None
    mix: Mapping[str, float] = field(default_factory=dict)
    most_turns: int = 1
    turns: tuple[tuple[str, str], ...] = ()
    system: str | None = None


@dataclass(frozen=True)
class Encoded:
    """A sample without its picture.

    boxes: float32 `(R, 4)` in input pixels, in placeholder order. regions: the same in pixels of the picture.
    """

    ids: list[int]
    labels: list[int]
    boxes: torch.Tensor
    regions: Boxes
    picture: PictureFile | None


class Unusable(ValueError):
    """An example that nothing can be learned from. kind: "bad" (it is broken), "silent" (it has nothing to ask about)
    or "masked" (no token of it is learned)."""

    def __init__(self, kind: Literal["bad", "silent", "masked"], name: str, reason: str) -> None:
        super().__init__(f"{name}: {reason}")
        self.kind, self.name, self.reason = kind, name, reason

    def __reduce__(self) -> tuple:
        return Unusable, (self.kind, self.name, self.reason)


def encode(example: Example, processor: RegionLlavaProcessor, max_tokens: int, rng: random.Random) -> Encoded:
    """The text of a sample. No picture is decoded; with row ends or tiles, its header is read.

    Raises:
        Unusable: see there.
    """
    size = NO_FRAME
    if example.record is not None:
        size = (example.record.width, example.record.height)
    try:
        if example.picture is not None and example.record is None and not processor.letterboxed:
            size = example.picture.size()
        frame = processor.frame(size)
        if example.record is not None:
            turns, ids, labels, count = fitting_turns(lambda: _drawn(example, rng), processor, frame, max_tokens)
            _refuse_placeholders(turns, example)
        else:
            turns = [RenderedTurn(question, (), answer) for question, answer in example.turns]
            if not turns:
                raise Unusable("silent", example.name, "it has nothing to ask about")
            _refuse_placeholders(turns, example)
            shown = example.picture is not None
            ids, labels, count = conversation_ids(
                processor, turns, frame, max_tokens, with_image=shown, system=example.system
            )
        regions = Boxes([box for turn in turns[:count] for box in turn.boxes])
        boxes = processor.to_input(regions, frame) if processor.embeds_regions else torch.zeros(0, 4)
    except TooLong as error:
        raise Unusable("masked", example.name, str(error)) from error
    except UserError as error:
        raise Unusable("bad", example.name, str(error)) from error
    if all(label == IGNORED for label in labels):
        raise Unusable("masked", example.name, "no token of it is learned")
    return Encoded(ids, labels, boxes, regions, example.picture)


def _drawn(example: Example, rng: random.Random) -> list[Turn]:
    assert example.record is not None
    if turns := sample_conversation(example.record, rng, example.mix, example.most_turns):
        return turns
    raise Unusable("silent", example.name, "it has nothing to ask about")


def with_pixels(sample: Encoded, processor: RegionLlavaProcessor) -> Sample:
    """Decode the picture. Raises ImageError."""
    if sample.picture is None:
        return Sample(sample.ids, sample.labels, None, sample.boxes)
    picture = sample.picture.open()
    if processor.region_prompt == "overlay":
        picture = draw_boxes(picture, sample.regions, OVERLAY_COLORS)
    pixels = np.ascontiguousarray(processor.pixels(picture))
    return Sample(sample.ids, sample.labels, pixels, sample.boxes, size=picture.size)


def _refuse_placeholders(turns: list[RenderedTurn], example: Example) -> None:
    """A placeholder that stands in the text by chance would want a picture or a box of its own."""
    for turn in turns:
        in_question = turn.question.count(REGION_TOKEN) - len(turn.boxes) + turn.question.count(IMAGE_TOKEN)
        if in_question or REGION_TOKEN in turn.answer or IMAGE_TOKEN in turn.answer:
            raise Unusable("bad", example.name, f"its text holds {IMAGE_TOKEN} or {REGION_TOKEN}")
