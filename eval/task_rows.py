"""Region records -> the rows of our tasks. A row is one question with everything that scoring it needs."""

import functools
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..mllm.prompts import LOCATE, READ, REFER
from ..train_stages.phrases import unique_phrases
from ..train_stages.record_io import RecordSet
from ..train_stages.records import Record
from ..vision_towers.errors import UserError

PREFIX = "regiontower_"  # lmms-eval's own names win over ours, so ours must be ours alone
TASKS = {PREFIX + kind: kind for kind in ("grounding", "referring", "reading", "absent")}

NO_REGION = -1


@dataclass(frozen=True)
class TaskRow:
    """One question. Boxes are xyxy in pixels of the original image after EXIF transpose.

    image: absolute path. width, height: of that raster, pixels. image_id: the record's `image`; rows of one image share
    it. region_index: position of the region in its record, `NO_REGION` where nothing fits. phrase: what grounding and
    absent ask for, else "". question: the text, with one `<region>` for each prompt box. prompt_boxes: the boxes of the
    question (none where a phrase is asked for). target_xyxy: the region's box, empty where nothing fits. answers: the
    accepted answers (none where a phrase is asked for).
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


def task_names(tasks: Sequence[str] | None) -> list[str]:
    """The asked tasks without repeats; all of ours for None. "grounding" is short for "regiontower_grounding".

    A UserError on an unknown name lists the known ones.
    """
    full = {kind: name for name, kind in TASKS.items()}
    names = list(dict.fromkeys(full.get(name, name) for name in tasks) if tasks is not None else TASKS)
    for name in names:
        if name not in TASKS:
            raise UserError(f"there is no task {name!r}; choose from {', '.join(TASKS)}")
    return names


def task_rows(
    records: RecordSet, tasks: Sequence[str] | None = None, limit: int | None = None
) -> dict[str, list[TaskRow]]:
    """The rows of each asked task, in the order of the file.

    - `regiontower_grounding`: one row for each image and phrase that is true of exactly one of its regions.
    - `regiontower_referring`: one row for each region with at least one such phrase; all of them are accepted.
    - `regiontower_reading`: one row for each region with a transcript.
    - `regiontower_absent`: one row for each image and phrase of which the record says that nothing fits it.

    Args:
        records: what `train_stages.record_io.read_records` returns.
        tasks: names out of `TASKS`; None for all.
        limit: at most so many rows a task, drawn by `even_sample`; None for all.

    Raises:
        UserError: an unknown task, a limit below 1.
    """
    rows: dict[str, list[TaskRow]] = {name: [] for name in task_names(tasks)}
    for record in records.records:
        phrases = unique_phrases(record)
        of_region: dict[int, list[str]] = {}
        for phrase, index in phrases:
            of_region.setdefault(index, []).append(phrase)

        row = functools.partial(_row, record, str(records.image_path(record).absolute()))
        asked = {
            "grounding": [row(index, LOCATE.format(phrase=phrase), phrase=phrase) for phrase, index in phrases],
            "referring": [row(index, REFER, answers=of_region[index]) for index in sorted(of_region)],
            "reading": [
                row(index, READ, answers=[region.ocr]) for index, region in enumerate(record.regions) if region.ocr
            ],
            "absent": [row(NO_REGION, LOCATE.format(phrase=phrase), phrase=phrase) for phrase in record.absent],
        }
        for name, found in rows.items():
            found += asked[TASKS[name]]
    return rows if limit is None else {name: even_sample(found, limit) for name, found in rows.items()}


def _row(
    record: Record, image: str, index: int, question: str, phrase: str = "", answers: Sequence[str] = ()
) -> TaskRow:
    box = [] if index == NO_REGION else list(record.regions[index].box_xyxy)
    return TaskRow(
        image=image,
        width=record.width,
        height=record.height,
        image_id=record.image,
        region_index=index,
        phrase=phrase,
        question=question,
        prompt_boxes=[] if phrase else [box],
        target_xyxy=box,
        answers=list(answers),
    )


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
