"""The functions that the task YAMLs name. lmms-eval calls them in threads; those that score never raise."""

import functools
from collections.abc import Mapping, Sequence

from PIL import Image

from ..train_stages.images import open_image
from .scoring import score_absent, score_grounding, score_phrase, score_text


@functools.lru_cache(maxsize=2)
def _picture(path: str) -> Image.Image:
    # Rows of one image follow each other, so each image is decoded about once.
    return open_image(path)


def doc_to_visual(doc: Mapping) -> list[Image.Image]:
    """The row's image, RGB, upright. Shared between calls: do not write into it."""
    return [_picture(doc["image"])]


def process_grounding(doc: Mapping, results: Sequence[str]) -> dict:
    """Scores of one answer; `prediction` is for the sample files and is not aggregated."""
    score = score_grounding(results[0], doc["target_xyxy"], (doc["width"], doc["height"]))
    return {
        "acc50": _scored(doc, score.correct),
        "miou": _scored(doc, score.iou),
        "parse_rate": _scored(doc, score.parsed),
        "prediction": {
            "status": score.status,
            "predicted_xyxy": None if score.predicted_xyxy is None else list(score.predicted_xyxy),
            "iou": score.iou,
            "parsed": score.parsed,
            "correct": score.correct,
        },
    }


def process_referring(doc: Mapping, results: Sequence[str]) -> dict:
    """Scores of one answer."""
    return _exact_match(doc, score_phrase(results[0], doc["answers"]))


def process_reading(doc: Mapping, results: Sequence[str]) -> dict:
    """Scores of one answer."""
    return _exact_match(doc, score_text(results[0], doc["answers"]))


def process_absent(doc: Mapping, results: Sequence[str]) -> dict:
    """Scores of one answer to a phrase that nothing fits."""
    score = score_absent(results[0], (doc["width"], doc["height"]))
    rejected = score.status == "none"
    return {
        "rejection": _scored(doc, rejected),
        "prediction": {
            "status": score.status,
            "predicted_xyxy": None if score.predicted_xyxy is None else list(score.predicted_xyxy),
            "correct": rejected,
        },
    }


def mean_score(items: Sequence[Mapping]) -> float:
    """The aggregation of every metric: the mean over rows."""
    return sum(item["score"] for item in items) / len(items)


def _exact_match(doc: Mapping, correct: bool) -> dict:
    return {"em": _scored(doc, correct), "prediction": {"correct": correct}}


def _scored(doc: Mapping, score: float) -> dict:
    # `score` and the cluster key `image_id` are the names lmms-eval reads for its own clustered standard error.
    return {"score": float(score), "image_id": doc["image_id"]}
