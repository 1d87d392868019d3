"""Region records -> files of instruction data that other trainers read, too.

The turns are those that `instruct` draws by itself when it is given region records (`conversations`), drawn once and
written down: in the layout of ms-swift, whose boxes stay numbers until a model's own convention writes them, or as
LLaVA conversations, with the boxes written into the text in one declared convention.
"""

from __future__ import annotations

import json
import os
import random
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from tqdm import tqdm

from ..mllm.boxes import Boxes, BoxFormat, ImageFrame, box_format
from ..mllm.prompts import IMAGE_TOKEN, NO_BOX, REGION_TOKEN
from ..vision_towers.errors import UserError
from .conversation_kinds import Box, BoxList, Turn
from .conversations import check_mix, render_turns, sample_conversation
from .question_wordings import WORDINGS
from .record_io import RecordSet
from .records import Record

REGION_MIX: dict[str, float] = {
    "referring": 2.0,
    "grounding": 2.0,
    "region_caption": 1.0,
    "reading": 1.0,
    "absent": 1.0,
    "several": 1.0,
    "compare": 1.0,
}
Layout = Literal["swift", "llava"]
_PLACE = "<bbox>"  # where ms-swift writes the next box of `objects`
_PATTERNS = {prompt: re.compile(re.sub(r"\\\{\w+\\\}", "(.+)", re.escape(prompt))) for prompt in WORDINGS}


@dataclass(frozen=True)
class WrittenInstructions:
    """path: the JSONL. conversations, and turns by kind; a kind of the mix with 0 found nothing to ask about."""

    path: Path
    conversations: int
    kinds: dict[str, int]
    without: int  # records that gave nothing


def write_instructions(
    records: RecordSet,
    out: str | Path,
    *,
    layout: Layout = "swift",
    boxes: str = "norm01",
    mix: Mapping[str, float] | None = None,
    turns: int = 6,
    per_image: int = 1,
    wordings: bool = True,
    seed: int = 0,
    progress: bool = True,
) -> WrittenInstructions:
    """Write one conversation a line; the same arguments write the same file.

    Args:
        records: images and their regions.
        out: the JSONL. Images are named by their absolute paths.
        layout: "swift" (`messages`, `images`, `objects` with boxes in pixels of the image) or "llava" (`image`,
            `conversations`, boxes in the text).
        boxes: convention of "llava", a name of `mllm.boxes.BOX_FORMATS`, in the frame of the whole image.
        mix, turns: as of `sample_conversation`; `REGION_MIX` when absent.
        per_image: conversations an image.
        wordings: ask in one of several ways (`question_wordings`) instead of always the same.
    Raises:
        UserError: a bad mix or layout, or no record gives a single turn.
    """
    if layout not in get_args(Layout):
        raise UserError(f"The layout must be {' or '.join(get_args(Layout))}; got {layout!r}.")
    chosen = REGION_MIX if mix is None else dict(mix)
    check_mix(chosen)
    convention, out = box_format(boxes), Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    kinds: Counter[str] = Counter()
    written = without = 0
    beside = out.with_name(f".{out.name}.tmp")
    with beside.open("w", encoding="utf-8") as stream:
        for number, record in enumerate(tqdm(records.records, desc="instructions", unit="img", disable=not progress)):
            found = 0
            for copy in range(per_image):
                rng = random.Random(f"{seed} {number} {copy}")
                talk = [turn for turn in sample_conversation(record, rng, chosen, turns) if _sayable(turn, convention)]
                if not talk:
                    continue
                if wordings:
                    talk = [reworded(turn, rng) for turn in talk]
                row = {"id": f"{number}-{copy}", "image": str(records.image_path(record).resolve())}
                write = _swift if layout == "swift" else _llava
                stream.write(json.dumps(write(row, talk, record, convention), ensure_ascii=False) + "\n")
                kinds.update(turn.kind for turn in talk)
                found += 1
            written += found
            without += not found
    if not written:
        beside.unlink()
        raise UserError(f"no record of {records.path} gives a question of the kinds {', '.join(chosen)}.")
    os.replace(beside, out)
    return WrittenInstructions(out, written, {kind: kinds[kind] for kind in chosen}, without)


def reworded(turn: Turn, rng: random.Random) -> Turn:
    """The same turn, asked in one of the ways that mean the same; one that we know no other way for stays."""
    for prompt, pattern in _PATTERNS.items():
        if match := pattern.fullmatch(turn.question):
            template = rng.choice(WORDINGS[prompt])
            question = re.sub(r"\{\w+\}", lambda _, words=match: words[1], template)
            return Turn(turn.kind, question, turn.answer, turn.question_boxes, turn.regions)
    return turn


def _sayable(turn: Turn, convention: BoxFormat) -> bool:
    """Neither layout may find a placeholder, or the convention its own marks, in the words of a record."""
    texts = [part for part in turn.answer if isinstance(part, str)] + [turn.question.replace(REGION_TOKEN, "")]
    labels = [label for part in turn.answer if isinstance(part, BoxList) for label in part.labels or ()]
    marks = (_PLACE, IMAGE_TOKEN, REGION_TOKEN, "<ref-object>")
    reserved = any(mark in label for label in labels for mark in convention.syntax.reserved)
    return not reserved and not any(mark in text for text in [*texts, *labels] for mark in marks)


def _swift(row: Mapping[str, str], talk: Sequence[Turn], record: Record, convention: BoxFormat) -> dict[str, Any]:
    """ms-swift's grounding layout: `<bbox>` in the text, `objects.bbox` in the order of their places."""
    placed: list[Box] = []
    messages = []
    for number, turn in enumerate(talk):
        asked = turn.question.replace(REGION_TOKEN, _PLACE)
        placed += turn.question_boxes
        answer = "".join(text for part in turn.answer for text in _places(part, placed))
        messages.append({"role": "user", "content": asked if number else IMAGE_TOKEN + asked})
        messages.append({"role": "assistant", "content": answer})
    objects = {"ref": [], "bbox": [list(box) for box in placed], "bbox_type": "real"}
    return {"messages": messages, "images": [row["image"]], "objects": objects}


def _places(part: str | BoxList, placed: list[Box]) -> Iterator[str]:
    """The part of an answer with a place for each box; the boxes go to `placed`."""
    if isinstance(part, str):
        yield part
        return
    placed += part.boxes
    labels = part.labels or [""] * len(part.boxes)
    yield ", ".join(f"{label}{_PLACE}" for label in labels) or NO_BOX


def _llava(row: Mapping[str, str], talk: Sequence[Turn], record: Record, convention: BoxFormat) -> dict[str, Any]:
    """LLaVA's layout: a region of a question is its box in the text."""
    frame = ImageFrame.identity((record.width, record.height))
    messages = []
    for number, turn in enumerate(render_turns(talk, convention, frame)):
        asked = turn.question
        for box in turn.boxes:
            asked = asked.replace(REGION_TOKEN, convention.write(Boxes([box]), frame), 1)
        messages.append({"from": "human", "value": asked if number else f"{IMAGE_TOKEN}\n{asked}"})
        messages.append({"from": "gpt", "value": turn.answer})
    return {**row, "conversations": messages}
