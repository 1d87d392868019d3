"""Rows and lmms-eval's logged scores -> the samples of a run: one flat dictionary a row, as the files and reports have
it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .captions import cider
from .opened import OpenedModel
from .task_kinds import ALL_TASKS, BOX_KINDS
from .task_rows import TaskRow


def flat_samples(
    task: str, logged: Sequence[Mapping], rows: Sequence[TaskRow], opened: OpenedModel
) -> list[dict[str, Any]]:
    """One dictionary a row, by doc_id. Every row must have come back (RuntimeError).

    `target` is what was to be answered: a box, a list of boxes (several, counting), or the accepted texts.
    """
    by_id = {sample["doc_id"]: sample for sample in logged}
    if sorted(by_id) != list(range(len(rows))):
        raise RuntimeError(f"lmms-eval scored {len(by_id)} of {len(rows)} rows")
    flat = []
    for doc_id, row in enumerate(rows):
        sample = {
            "doc_id": doc_id,
            "image": row.image,
            "image_id": row.image_id,
            "width": row.width,
            "height": row.height,
            "region_index": row.region_index,
            "distractors": row.distractors,
            "question": row.question,
            "prompt_boxes": row.prompt_boxes,
            "answer": by_id[doc_id]["filtered_resps"][0],
            "target": _target(row),
            **by_id[doc_id]["prediction"],
        }
        for name in ("point_xy", "shape", "choices"):
            if getattr(row, name):
                sample[name] = getattr(row, name)
        if ALL_TASKS[task] in BOX_KINDS:
            sample |= _scores(task, doc_id, sample, opened)
        flat.append(sample)
    if ALL_TASKS[task] == "captioning":
        scores = cider([sample["answer"] for sample in flat], [row.answers for row in rows])
        for sample, score in zip(flat, scores, strict=True):
            sample["cider"] = score
    return flat


def _target(row: TaskRow) -> list:
    if row.targets:
        return row.targets
    return row.target_xyxy if row.phrase else row.answers


def _scores(task: str, doc_id: int, sample: Mapping, opened: OpenedModel) -> dict[str, Any]:
    """`box_scores`, one for each box of the answer, where the model gave any."""
    scores = opened.box_scores(task, doc_id)
    return {"box_scores": scores} if scores and sample["status"] == "boxes" else {}


def box_view(row: TaskRow, sample: Mapping) -> dict[str, Any]:
    """What `confidence` needs of a row whose answer is boxes. Of a question for one box only the first box counts."""
    scores = sample.get("box_scores")
    if "predicted_boxes" in sample:
        boxes = sample["predicted_boxes"]
    else:
        first = sample["predicted_xyxy"]
        boxes, scores = ([] if first is None else [first]), scores and scores[:1]
    if scores and len(scores) != len(boxes):
        raise RuntimeError(f"an answer with {len(boxes)} boxes came with {len(scores)} scores")
    true = row.targets or ([row.target_xyxy] if row.target_xyxy else [])
    return {"boxes": boxes, "box_scores": scores, "true_boxes": true, "image_id": row.image_id}


def region_view(row: TaskRow, sample: Mapping) -> dict[str, Any]:
    """What `breakdown` needs of a row."""
    return {
        "region_box": row.target_xyxy,
        "width": row.width,
        "height": row.height,
        "distractors": row.distractors,
        "image_id": row.image_id,
        "correct": sample["correct"],
    }
