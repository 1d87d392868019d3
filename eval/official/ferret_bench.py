"""Ferret-Bench (You et al. 2023, arXiv 2310.07704, section 5.4): open questions about regions, marked by a judge.

`question.jsonl`, `answer.jsonl` (GPT-4's) and `context.jsonl` (the image in words) have a line a question; `rule.json`
has what the judge is told for each category. Boxes of the files are xyxy in 0..1.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...mllm.prompts import REGION_TOKEN
from ...train_stages.images import image_size
from ...train_stages.importers.fields import json_document, json_lines, need
from ...vision_towers.errors import UserError
from ..task_rows import NO_REGION, TaskRow
from .layout import COCO_PAGE, FERRET_PAGE, need_file, need_folder

# Category -> its folder in Ferret's repository.
FOLDERS = {"refer_desc": "refer_caption", "refer_reason": "refer_reason", "ground_conv": "ground_conv"}
OFFICIAL_QUESTIONS = 40  # of each category
_BOX = re.compile(r"\[([^\[\]]*)\]")


def ferret_bench_rows(root: Path, category: str, *, check_count: bool = True) -> list[TaskRow]:
    """One row a question; its boxes become `<region>` prompts. What the judge needs is in `context`, the reference
    answer in `answers`.

    Args:
        root: data root (`layout`).
        category: a key of `FOLDERS`.
        check_count: there must be `OFFICIAL_QUESTIONS`.

    Raises:
        Absent: there is no folder `ferret_bench`.
        UserError: a file or image is missing or is not of this form, or the number of questions is not the official
            one.
    """
    folder = need_folder(root / "ferret_bench", FERRET_PAGE)
    rules = json_document(need_file(folder / "rule.json", FERRET_PAGE))
    part = folder / FOLDERS[category]
    questions, answers, contexts = (
        _lines(need_file(part / f"{name}.jsonl", FERRET_PAGE)) for name in ("question", "answer", "context")
    )
    if check_count and len(questions) != OFFICIAL_QUESTIONS:
        raise UserError(
            f"{part / 'question.jsonl'}: has {len(questions)} questions, the official file has {OFFICIAL_QUESTIONS}; "
            f"get it from {FERRET_PAGE}."
        )
    by_image = {need(item, "image", str): need(item, "text", str) for item in contexts}
    reference = {item.get("question_id"): need(item, "text", str) for item in answers}
    try:
        rule = rules[category]
        return [
            _row(
                root.absolute() / "val2017",
                question,
                reference[question["question_id"]],
                {
                    "context": by_image[question["image"]],
                    "question": question["text"],
                    "rule": rule["prompt"],
                    "role": rule["role"],
                    "category": category,
                },
            )
            for question in questions
        ]
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(f"{part}: its files do not belong together ({error}); get them from {FERRET_PAGE}.") from None


def _lines(path: Path) -> list[Mapping[str, Any]]:
    found = []
    for label, item in json_lines(path):
        if isinstance(item, ValueError):
            raise UserError(f"{path}: {label} {item}; get the file from {FERRET_PAGE}.")
        found.append(item)
    return found


def _row(images: Path, question: Mapping[str, Any], reference: str, told: Mapping[str, str]) -> TaskRow:
    path = need_file(images / need(question, "image", str), COCO_PAGE)
    width, height = image_size(path)
    boxes: list[list[float]] = []

    def as_region(found: re.Match[str]) -> str:
        x0, y0, x1, y1 = (float(number) for number in found[1].split(","))
        boxes.append([x0 * width, y0 * height, x1 * width, y1 * height])
        return REGION_TOKEN

    text = _BOX.sub(as_region, need(question, "text", str))
    return TaskRow(
        image=str(path),
        width=width,
        height=height,
        image_id=path.name,
        region_index=NO_REGION,
        phrase="",
        question=text,
        prompt_boxes=boxes,
        target_xyxy=[],
        answers=[reference],
        context=json.dumps(told, ensure_ascii=False),
    )
