"""What an answer is worth that looks at no pixel: the numbers that a model has to beat."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from ..train_stages.phrases import normalise_phrase, unique_phrases
from ..train_stages.record_io import RecordSet, read_records
from .scoring import BoxScore, score_box, score_phrase, score_text, summarise
from .task_kinds import RECORD_TASKS
from .task_rows import TaskRow, task_names, task_rows


def trivial_baselines(
    data: str | Path,
    *,
    train: str | Path | None = None,
    tasks: Sequence[str] | None = None,
    format: str = "records",
    image_root: str | Path | None = None,
    limit: int | None = None,
) -> dict[str, dict[str, dict]]:
    """Figures of the trivial answers on the very rows that `run.evaluate` would ask with the same arguments.

    - grounding: `whole_image`, and `largest_box`: the largest region of the image's record (the first of equals), which
      a model would have to find first.
    - referring: `majority_phrase`; reading: `majority_text`: always the most frequent one (the first of equals) over
      the regions of `train`, or of `data` itself without it, which flatters the baseline.
    - Further tasks have none, except that `text_grounding` is a kind of grounding.

    Args:
        data, format, image_root, limit: as for `run.evaluate`.
        train: file of region records of the same format and image root.

    Returns task name -> baseline name -> figures as in `run.EvalResult.tasks`, the text ones with their `answer`.
    """
    records = read_records(data, format=format, image_root=image_root, check_images=True)
    rows = task_rows(records, tasks=task_names(tasks), limit=limit)
    source = records if train is None else read_records(train, format=format, image_root=image_root)
    largest = _largest_boxes(records)
    of_kind: dict[str, Callable[[list[TaskRow]], dict[str, dict]]] = {
        "grounding": lambda found: {
            "whole_image": _grounding(found, lambda row: [0.0, 0.0, float(row.width), float(row.height)]),
            "largest_box": _grounding(found, lambda row: largest[row.image]),
        },
        "referring": lambda found: {"majority_phrase": _constant("referring", found, _phrases(source), score_phrase)},
        "reading": lambda found: {"majority_text": _constant("reading", found, _transcripts(source), score_text)},
    }
    # absent has none: "none" always would be right here and wrong on every row of grounding.
    return {name: of_kind.get(RECORD_TASKS[name], lambda found: {})(found) for name, found in rows.items()}


def _largest_boxes(records: RecordSet) -> dict[str, list[float]]:
    """Absolute image path -> box of the largest region."""
    return {
        str(records.image_path(record).absolute()): list(max((r.box_xyxy for r in record.regions), key=_area))
        for record in records.records
        if record.regions
    }


def _area(box: Sequence[float]) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def _phrases(records: RecordSet) -> Iterable[str]:
    return (phrase for record in records.records for phrase, _ in unique_phrases(record))


def _transcripts(records: RecordSet) -> Iterable[str]:
    return (region.ocr for record in records.records for region in record.regions if region.ocr)


def _grounding(rows: Sequence[TaskRow], predict: Callable[[TaskRow], Sequence[float]]) -> dict:
    scores: list[BoxScore] = [score_box(predict(row), row.target_xyxy) for row in rows]
    return summarise(
        "grounding",
        [
            {"image_id": row.image_id, "iou": score.iou, "correct": score.correct, "parsed": score.parsed}
            for row, score in zip(rows, scores, strict=True)
        ],
    )


def _constant(
    kind: str, rows: Sequence[TaskRow], texts: Iterable[str], score: Callable[[str, Sequence[str]], bool]
) -> dict:
    counted = Counter(normalise_phrase(text) for text in texts)
    answer = counted.most_common(1)[0][0] if counted else ""
    samples = [{"image_id": row.image_id, "correct": score(answer, row.answers)} for row in rows]
    return {**summarise(kind, samples), "answer": answer}
