"""Region records -> conversations: what the language model reads and what it should answer.

A `Turn` holds boxes as numbers in original pixels; `render_turns` writes them in a model's declared box format when the
frame of the image is known. Which turns a record gives is in `conversation_kinds`; here they are drawn, packed into one
conversation per image, and rendered.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from ..mllm.boxes import Boxes, BoxFormat, ImageFrame
from ..mllm.prompts import REGION_TOKEN
from ..vision_towers.errors import UserError
from .conversation_kinds import KINDS, Box, BoxList, Turn, contains, is_plain
from .records import Record, Region

DEFAULT_MIX: dict[str, float] = {
    "grounding": 4.0,
    "referring": 4.0,
    "reading": 3.0,
    "region_caption": 1.0,
    "image_caption": 0.5,
    "absent": 1.5,
    "several": 1.5,
    "classify": 1.0,
    "count": 1.0,
    "compare": 1.0,
    "point": 0.5,
    "listing": 0.3,
}


class RenderedTurn(NamedTuple):
    """`question` has one `<region>` for each box of `boxes` (original pixels); `answer` is plain text."""

    question: str
    boxes: tuple[Box, ...]
    answer: str


def check_mix(mix: Mapping[str, float]) -> None:
    """Raise `UserError` for an unknown kind, a negative weight, or a mix in which nothing has weight."""
    unknown = sorted(set(mix) - set(KINDS))
    if unknown:
        raise UserError(f"The mix names unknown kinds of turn {', '.join(unknown)}: choose among {', '.join(KINDS)}.")
    if any(weight < 0 for weight in mix.values()) or not any(mix.values()):
        raise UserError("The mix needs weights that are not negative, and at least one that is not zero.")


def sample_conversation(
    record: Record, rng: random.Random, mix: Mapping[str, float] = DEFAULT_MIX, turns: int = 6
) -> list[Turn]:
    """Up to `turns` turns about one image, kinds drawn by the weights of `mix` (kind -> weight; a missing kind is 0).

    No region is asked about twice, because the text of the earlier turn would give the later answer away and the model
    would learn to look there instead of at the image; `listing`, which names all, comes last. So an image with few
    regions gives fewer turns, and a record that has nothing for any kind gives none. Turns are shuffled: those that use
    up no region (`absent`, `count`) are drawn late, and a model would learn to expect them late. The same record, state
    of `rng` and mix give the same turns. Raises `UserError` for a bad mix.
    """
    check_mix(mix)
    sources = {kind: KINDS[kind](record, rng) for kind, weight in mix.items() if weight > 0}
    chosen: list[Turn] = []
    used: set[int] = set()
    while sources and len(chosen) < turns:
        kinds = list(sources)
        kind = rng.choices(kinds, [mix[kind] for kind in kinds])[0]
        turn = next((turn for turn in sources[kind] if turn.kind == "listing" or not used & turn.regions), None)
        if turn is None:
            del sources[kind]
            continue
        chosen.append(turn)
        if turn.kind != "listing":
            used |= turn.regions
    return sorted(rng.sample(chosen, len(chosen)), key=lambda turn: turn.kind == "listing")


def render_turns(turns: Sequence[Turn], box_format: BoxFormat, frame: ImageFrame) -> list[RenderedTurn]:
    """Write the answers' boxes in `box_format` for an image seen through `frame`.

    A turn is dropped when `frame` shows nothing of one of its boxes (a crop left it out: what it says is no longer
    true), or when a label holds what the format reserves for boxes.
    """
    return [
        RenderedTurn(turn.question, turn.question_boxes, _answer(turn, box_format, frame))
        for turn in turns
        if _all_visible(turn, frame) and _writable(turn, box_format)
    ]


def text_messages(
    turns: Sequence[RenderedTurn],
    box_format: BoxFormat,
    frame: ImageFrame,
    scene_text: str = "",
    regions: Sequence[Region] = (),
) -> list[dict[str, str]]:
    """The conversation for a model that sees no image: chat messages in plain text.

    `scene_text` (see `describe_scene`) stands where `<image>` would stand. Instead of each `<region>` stand the words
    of that one of `regions`, and its box: so the model learns to take from there what a projected embedding will bring.
    """
    messages: list[dict[str, str]] = []
    for number, turn in enumerate(turns):
        question = _in_words(turn, regions, box_format, frame)
        messages.append({"role": "user", "content": question if number else scene_text + question})
        messages.append({"role": "assistant", "content": turn.answer})
    return messages


def describe_scene(record: Record, rng: random.Random, box_format: BoxFormat, frame: ImageFrame) -> str:
    """The image in text form: a line `box words` for each region, in random order, so that the language model learns
    to find the object that is asked for and to copy what belongs to it.
    """
    regions = rng.sample(record.regions, len(record.regions))
    return "".join(
        f"{box_format.write(Boxes([region.box_xyxy]), frame)} {words}\n"
        for region in regions
        if is_plain(words := region_words(region))
    )


def region_words(region: Region) -> str:
    """What the region itself shows, as in `red sign "apple"`: tags, category, transcript. Not where it is."""
    names = [tag for tag in dict.fromkeys(region.tags) if tag != region.category]
    names += [region.category] if region.category else []
    return " ".join([*names, *([f'"{region.ocr}"'] if region.ocr else [])])


def corpus_texts(record: Record, rng: random.Random, box_format: BoxFormat) -> Iterator[str]:
    """Every text of a record, and questions and answers about it: what a tokenizer is trained on."""
    frame = ImageFrame.identity((record.width, record.height))
    yield from record.captions
    for region in record.regions:
        yield from (*region.texts, *region.captions)
        yield from [region.ocr] if region.ocr else []
    yield from describe_scene(record, rng, box_format, frame).splitlines()
    for message in text_messages(render_turns(sample_conversation(record, rng), box_format, frame), box_format, frame):
        yield message["content"]


def _answer(turn: Turn, box_format: BoxFormat, frame: ImageFrame) -> str:
    return "".join(
        part if isinstance(part, str) else box_format.write(Boxes(part.boxes), frame, labels=part.labels)
        for part in turn.answer
    )


def _writable(turn: Turn, box_format: BoxFormat) -> bool:
    labels = [label for part in turn.answer if isinstance(part, BoxList) for label in part.labels or ()]
    return not any(mark in label for label in labels for mark in box_format.syntax.reserved)


def _all_visible(turn: Turn, frame: ImageFrame) -> bool:
    boxes = [*turn.question_boxes, *(box for part in turn.answer if isinstance(part, BoxList) for box in part.boxes)]
    return len(frame.visible_part(Boxes(boxes))[1]) == len(boxes)


def _in_words(turn: RenderedTurn, regions: Sequence[Region], box_format: BoxFormat, frame: ImageFrame) -> str:
    first, *rest = turn.question.split(REGION_TOKEN)
    return first + "".join(
        f"{_words_at(box, regions)} {box_format.write(Boxes([box]), frame)}{text}"
        for box, text in zip(turn.boxes, rest, strict=True)
    )


def _words_at(box: Box, regions: Sequence[Region]) -> str:
    """The words of the region with this box, or of the smallest one around its middle (a box around a point);
    `<region>` where nothing has words."""
    x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    named = [region for region in regions if is_plain(region_words(region))]
    around = [region for region in named if region.box_xyxy == box]
    around = around or sorted((region for region in named if contains(region.box_xyxy, (x, y))), key=_area)
    return region_words(around[0]) if around else REGION_TOKEN


def _area(region: Region) -> float:
    x1, y1, x2, y2 = region.box_xyxy
    return (x2 - x1) * (y2 - y1)
