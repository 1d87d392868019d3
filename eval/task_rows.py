"""Region records -> the rows of our tasks. A row is one question with everything that scoring it needs."""

import functools
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..mllm.prompts import LOCATE, READ, REFER
from ..train_stages.phrases import unique_phrases
from ..train_stages.record_io import RecordSet
from ..train_stages.records import Record
from ..vision_towers.errors import UserError
from .task_kinds import TASKS, task_names

__all__ = ["NO_REGION", "TASKS", "TaskRow", "even_sample", "is_grounding_row", "is_task_row", "task_names", "task_rows"]

NO_REGION = -1
UNKNOWN = -1


@dataclass(frozen=True)
class TaskRow:
    """One question. Boxes are xyxy in pixels of the original image after EXIF transpose.

    image: absolute path. width, height: of that raster, pixels. image_id: the record's `image`; rows of one image share
    it. region_index: position of the region in its record, `NO_REGION` where nothing fits. phrase: what is asked to be
    located, else "". question: the text, with one `<region>` for each prompt box. prompt_boxes: the boxes of the
    question (none where a phrase is asked for). target_xyxy: the region's box, empty where nothing fits, or where
    several are asked for. answers: the accepted answers (none where a phrase is asked for).

    targets: all true boxes where several are asked for. choices: of a question "... a or b?" the true name first, then
    the wrong one. point_xy: the point that the prompt box stands for. shape: the free-form shape that it stands for, as
    the compressed counts of a COCO RLE of the image's size. distractors: how many other things of the target's
    category the image holds, `UNKNOWN` where nobody says. context: what a judge of the answer is told.
    """

    image: str
    width: int
    height: int
    image_id: str
    region_index: int
    phrase: str
    question: str
    prompt_boxes: list[list[float]]
    target_xyxy: list[float]
    answers: list[str]
    targets: list[list[float]] = field(default_factory=list)
    choices: list[str] = field(default_factory=list)
    point_xy: list[float] = field(default_factory=list)
    shape: str = ""
    distractors: int = UNKNOWN
    context: str = ""


def task_rows(
    records: RecordSet, tasks: Sequence[str] | None = None, limit: int | None = None
) -> dict[str, list[TaskRow]]:
    """The rows of each asked task, in the order of the file.

    - `regiontower_grounding`: one row for each image and phrase that is true of exactly one of its regions.
    - `regiontower_referring`: one row for each region with at least one such phrase; all of them are accepted.
    - `regiontower_reading`: one row for each region with a transcript.
    - `regiontower_absent`: one row for each image and phrase of which the record says that nothing fits it.

    The further ones are in `more_rows`.

    Args:
        records: what `train_stages.record_io.read_records` returns.
        tasks: names out of `RECORD_TASKS`; None for the four above.
        limit: at most so many rows a task, drawn by `even_sample`; None for all.

    Raises:
        UserError: an unknown task, a limit below 1.
    """
    from .more_rows import more_rows

    names = task_names(tasks)
    basic = [name for name in names if name in TASKS]
    rows: dict[str, list[TaskRow]] = {name: [] for name in names}
    for name, found in more_rows(records, [name for name in names if name not in TASKS]).items():
        rows[name] += found
    for record in records.records if basic else ():
        phrases = unique_phrases(record)
        of_region: dict[int, list[str]] = {}
        for phrase, index in phrases:
            of_region.setdefault(index, []).append(phrase)

        row = functools.partial(row_of, record, str(records.image_path(record).absolute()))
        asked = {
            "grounding": [row(index, LOCATE.format(phrase=phrase), phrase=phrase) for phrase, index in phrases],
            "referring": [row(index, REFER, answers=of_region[index]) for index in sorted(of_region)],
            "reading": [
                row(index, READ, answers=[region.ocr]) for index, region in enumerate(record.regions) if region.ocr
            ],
            "absent": [row(NO_REGION, LOCATE.format(phrase=phrase), phrase=phrase) for phrase in record.absent],
        }
        for name in basic:
            rows[name] += asked[TASKS[name]]
    return rows if limit is None else {name: even_sample(found, limit) for name, found in rows.items()}


def row_of(record: Record, image: str, index: int, question: str, phrase: str = "", **fields: Any) -> TaskRow:
    """A row about the region `index` of a record (`NO_REGION`: none). image: absolute path. fields: of `TaskRow`; the
    prompt box of a question without a phrase is the region's own box unless they say otherwise."""
    box = [] if index == NO_REGION else list(record.regions[index].box_xyxy)
    known: dict[str, Any] = {
        "prompt_boxes": [] if phrase else [box],
        "answers": [],
        "distractors": distractors(record, index),
    }
    return TaskRow(
        image=image,
        width=record.width,
        height=record.height,
        image_id=record.image,
        region_index=index,
        phrase=phrase,
        question=question,
        target_xyxy=box,
        **{**known, **fields},
    )


def distractors(record: Record, index: int) -> int:
    """How many further regions have the category of this one; `UNKNOWN` without a category."""
    category = None if index == NO_REGION else record.regions[index].category
    if category is None:
        return UNKNOWN
    return sum(region.category == category for region in record.regions) - 1


def even_sample(rows: Sequence[TaskRow], limit: int, seed: int = 0) -> list[TaskRow]:
    """At most `limit` rows, spread evenly over the images, in their first order; the same rows every time.

    Images are taken in a shuffled order, one row of each in turn (in a shuffled order within the image), until `limit`
    is reached: a file's first images would be a biased sample of a sorted file.
    """
    if limit < 1:
        raise UserError(f"the limit of rows is {limit}; it must be at least 1")
    if limit >= len(rows):
        return list(rows)
    rng = random.Random(seed)
    of_image: dict[str, list[int]] = {}
    for position, row in enumerate(rows):
        of_image.setdefault(row.image_id, []).append(position)
    queues = list(of_image.values())
    rng.shuffle(queues)
    for queue in queues:
        rng.shuffle(queue)
    chosen: list[int] = []
    turn = 0
    while len(chosen) < limit:
        chosen += [queue[turn] for queue in queues if turn < len(queue)]
        turn += 1
    return [rows[position] for position in sorted(chosen[:limit])]


def is_task_row(doc: Mapping) -> bool:
    """Whether a document of lmms-eval is a row of ours."""
    return "prompt_boxes" in doc and "target_xyxy" in doc


def is_grounding_row(doc: Mapping) -> bool:
    """Whether it is one that asks for a box."""
    return is_task_row(doc) and bool(doc["phrase"])
