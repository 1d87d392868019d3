"""Region records -> the rows of the further tasks: several objects, counting, text, classification, descriptions."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ..mllm.boxes import Points
from ..mllm.prompts import DESCRIBE_REGION, LOCATE, REGION_TOKEN
from ..train_stages.conversation_kinds import contains, is_plain
from ..train_stages.masks import encode_mask
from ..train_stages.phrases import normalise_phrase, shared_texts, unique_phrases
from ..train_stages.record_io import RecordSet
from ..train_stages.records import Record
from .task_kinds import PREFIX
from .task_rows import NO_REGION, TaskRow, row_of

# Ferret's question (You et al. 2023, arXiv 2310.07704, section 5.1), with the region where its location stood.
CLASSIFY_CHOICE = f"Is the object {REGION_TOKEN} of the image a {{first}} or a {{second}}?"
STROKE_SHARE = 0.08  # thickness of a free-form stroke, of the longer side of the object's box
MIN_STROKE = 3  # pixels

Rows = Iterator[TaskRow]


def more_rows(records: RecordSet, tasks: Sequence[str]) -> dict[str, list[TaskRow]]:
    """The rows of each asked task, in the order of the file.

    - `several`: a phrase true of two or more regions, as a whole -> all of their boxes.
    - `counting`: a category -> the boxes of all its regions; how many there are is the number of boxes. Not asked of a
      category that also occurs as stuff (a crowd has no number).
    - `text_grounding`: a transcript that stands once in the image -> its box, asked by a phrase of the record that
      quotes it, else by `the text "..."`.
    - `classify_box`, `classify_point`, `classify_shape`: is this region a (its category) or a (another)? As in Ferret's
      RefLVIS: the other is the category of the nearest object in the image, or of another image when all are alike;
      the true one stands first in every other row. A point lies on the object's mask, a shape is a stroke inside it;
      regions without a mask give none.
    - `captioning`: a region with captions -> a description.
    """
    every_category = sorted({name for record in records.records for _, name in _objects(record)})
    makers: dict[str, Callable[[Record, str], Rows]] = {
        "several": _several,
        "counting": _counting,
        "text_grounding": _text_grounding,
        "classify_box": lambda record, image: _classify(record, image, every_category, _by_box),
        "classify_point": lambda record, image: _classify(record, image, every_category, _by_point),
        "classify_shape": lambda record, image: _classify(record, image, every_category, _by_shape),
        "captioning": _captioning,
    }
    found: dict[str, list[TaskRow]] = {}
    for task in tasks:
        make = makers[task.removeprefix(PREFIX)]
        rows = [row for record in records.records for row in make(record, str(records.image_path(record).absolute()))]
        found[task] = alternate(rows) if "classify" in task else rows
    return found


def alternate(rows: Sequence[TaskRow]) -> list[TaskRow]:
    """The questions with the true name first in every other row, as in Ferret's script."""
    return [
        replace(
            row, question=row.question.format(first=row.choices[position % 2], second=row.choices[1 - position % 2])
        )
        for position, row in enumerate(rows)
    ]


def _several(record: Record, image: str) -> Rows:
    for key, indices in shared_texts(record).items():
        phrase = next(text for text in record.regions[indices[0]].texts if normalise_phrase(text) == key)
        if not any(record.regions[index].stuff for index in indices):
            yield _all_of(record, image, phrase, indices)


def _counting(record: Record, image: str) -> Rows:
    stuff = {region.category for region in record.regions if region.stuff}
    by_category: dict[str, list[int]] = {}
    for index, category in _objects(record):
        if category not in stuff:
            by_category.setdefault(category, []).append(index)
    for category, indices in by_category.items():
        yield _all_of(record, image, category, indices)


def _all_of(record: Record, image: str, phrase: str, indices: Sequence[int]) -> TaskRow:
    targets = [list(record.regions[index].box_xyxy) for index in indices]
    return row_of(record, image, NO_REGION, LOCATE.format(phrase=phrase), phrase=phrase, targets=targets)


def _text_grounding(record: Record, image: str) -> Rows:
    unique: dict[int, list[str]] = {}
    for phrase, index in unique_phrases(record):
        unique.setdefault(index, []).append(phrase)
    transcripts = [normalise_phrase(region.ocr) for region in record.regions if region.ocr]
    for index, region in enumerate(record.regions):
        if not region.ocr or transcripts.count(normalise_phrase(region.ocr)) > 1:
            continue
        quotes = [phrase for phrase in unique.get(index, []) if f'"{region.ocr}"' in phrase]
        phrase = min(quotes, key=len) if quotes else f'the text "{region.ocr}"'
        yield row_of(record, image, index, LOCATE.format(phrase=phrase), phrase=phrase)


def _captioning(record: Record, image: str) -> Rows:
    for index, region in enumerate(record.regions):
        if region.captions:
            yield row_of(record, image, index, DESCRIBE_REGION, answers=list(region.captions))


def _objects(record: Record) -> list[tuple[int, str]]:
    """Index and category of the regions that are one countable thing each."""
    return [
        (index, region.category)
        for index, region in enumerate(record.regions)
        if region.category and not region.stuff and is_plain(region.category)
    ]


Prompt = tuple[list[float], dict[str, Any]]  # the prompt box and further fields of the row


def _classify(
    record: Record, image: str, every_category: Sequence[str], prompt: Callable[[Record, int], Prompt | None]
) -> Rows:
    objects = _objects(record)
    for index, category in objects:
        other = _nearest_other(record, index, category, objects) or _any_other(record, index, category, every_category)
        asked = prompt(record, index) if other else None
        if asked:
            box, fields = asked
            fields |= {"prompt_boxes": [box], "choices": [category, other], "answers": [category]}
            yield row_of(record, image, index, CLASSIFY_CHOICE, **fields)


def _nearest_other(record: Record, index: int, category: str, objects: Sequence[tuple[int, str]]) -> str | None:
    x, y = _middle(record, index)
    others = [(other, name) for other, name in objects if name != category]
    if not others:
        return None
    return min(
        others, key=lambda item: (_middle(record, item[0])[0] - x) ** 2 + (_middle(record, item[0])[1] - y) ** 2
    )[1]


def _any_other(record: Record, index: int, category: str, every_category: Sequence[str]) -> str | None:
    others = [name for name in every_category if name != category]
    return random.Random(f"{record.image} {index}").choice(others) if others else None


def _middle(record: Record, index: int) -> tuple[float, float]:
    x0, y0, x1, y1 = record.regions[index].box_xyxy
    return (x0 + x1) / 2, (y0 + y1) / 2


def _by_box(record: Record, index: int) -> Prompt:
    return list(record.regions[index].box_xyxy), {}


def _by_point(record: Record, index: int) -> Prompt | None:
    """A point of the object's mask that no smaller object's box holds, nearest to the mask's middle."""
    mask = record.regions[index].mask
    if mask is None:
        return None
    rows, columns = np.nonzero(mask.to_array())
    points = np.stack([columns + 0.5, rows + 0.5], axis=1)
    order = np.square(points - points.mean(axis=0)).sum(axis=1).argsort(kind="stable")
    inner = [
        region.box_xyxy
        for other, region in enumerate(record.regions)
        if other != index and not region.stuff and _area(region.box_xyxy) < _area(record.regions[index].box_xyxy)
    ]
    for x, y in points[order].tolist():
        if not any(contains(box, (x, y)) for box in inner):
            (box,) = Points([[x, y]]).to_boxes().clip(record.width, record.height)
            return list(box), {"point_xy": [x, y]}
    return None


def _by_shape(record: Record, index: int) -> Prompt | None:
    """A stroke through three points of the object's mask, as thick as `STROKE_SHARE` says, cut to the mask."""
    mask = record.regions[index].mask
    if mask is None:
        return None
    from PIL import Image, ImageDraw

    inside = mask.to_array()
    pixels = np.argwhere(inside)
    corners = pixels[np.random.default_rng(index).choice(len(pixels), size=3)]
    x0, y0, x1, y1 = record.regions[index].box_xyxy
    canvas = Image.new("1", (record.width, record.height))
    thickness = max(MIN_STROKE, round(STROKE_SHARE * max(x1 - x0, y1 - y0)))
    ImageDraw.Draw(canvas).line([(int(x), int(y)) for y, x in corners], fill=1, width=thickness, joint="curve")
    stroke = np.asarray(canvas) & inside
    if not stroke.any():
        stroke[tuple(corners[0])] = True
    return shape_box(stroke), {"shape": encode_mask(stroke)["counts"]}


def shape_box(mask: np.ndarray) -> list[float]:
    """The box around the pixels of a `(height, width)` mask, continuous edges."""
    rows, columns = np.nonzero(mask)
    return [float(columns.min()), float(rows.min()), float(columns.max() + 1), float(rows.max() + 1)]


def _area(box: Sequence[float]) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])
