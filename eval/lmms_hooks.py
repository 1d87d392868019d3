"""The functions that the task YAMLs name. lmms-eval calls them in threads; those that score never raise."""

import functools
from collections.abc import Mapping, Sequence

from PIL import Image

from ..train_stages.images import open_image
from .box_sets import score_set, set_fields
from .captions import cider, rouge_l
from .choices import score_choice
from .conventions import parse_answer, shown_picture
from .scoring import BoxScore, score_first_box, score_phrase, score_rejection, score_text


@functools.lru_cache(maxsize=2)
def _picture(path: str) -> Image.Image:
    # Rows of one image follow each other, so each image is decoded about once.
    return open_image(path)


def doc_to_visual(doc: Mapping) -> list[Image.Image]:
    """The row's image, RGB, upright, as its convention shows it. Shared between calls: do not write into it."""
    return [shown_picture(doc, _picture(doc["image"]))]


def process_grounding(doc: Mapping, results: Sequence[str]) -> dict:
    """Scores of one answer; `prediction` is for the sample files and is not aggregated."""
    parsed = parse_answer(doc, results[0])
    score = score_first_box(parsed, doc["target_xyxy"])
    return {
        "acc50": _scored(doc, score.correct),
        "miou": _scored(doc, score.iou),
        "parse_rate": _scored(doc, score.parsed),
        "prediction": {
            **_first_box(score),
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
    score = score_rejection(parse_answer(doc, results[0]))
    rejected = score.status == "none"
    return {"rejection": _scored(doc, rejected), "prediction": {**_first_box(score), "correct": rejected}}


def process_several(doc: Mapping, results: Sequence[str]) -> dict:
    """Scores of one answer about several things: all of its boxes count."""
    score = score_set(parse_answer(doc, results[0]), doc["targets"])
    return {
        **_ratios(doc, score),
        "f1": _scored(doc, 2 * score.found, score.predicted + score.true),
        "exact": _scored(doc, score.exact),
        "parse_rate": _scored(doc, score.status == "boxes"),
        "prediction": {**set_fields(score), "correct": score.exact},
    }


def process_counting(doc: Mapping, results: Sequence[str]) -> dict:
    """Scores of one answer whose number of boxes is the number that was asked for."""
    score = score_set(parse_answer(doc, results[0]), doc["targets"])
    error = abs(score.predicted - score.true)
    return {
        **_ratios(doc, score),
        "count_acc": _scored(doc, not error),
        "mae": _scored(doc, error),
        "prediction": {**set_fields(score), "count_error": error, "correct": not error},
    }


def process_classification(doc: Mapping, results: Sequence[str]) -> dict:
    """Scores of one answer to "is it a or b?"."""
    score = score_choice(results[0], doc["answers"], doc["choices"][1])
    return {
        "acc": _scored(doc, score.correct),
        "acc_ferret": _scored(doc, score.named),
        "prediction": {"correct": score.correct, "named": score.named},
    }


def process_captioning(doc: Mapping, results: Sequence[str]) -> dict:
    """Scores of one description. CIDEr needs all of them: its items carry the texts."""
    score = rouge_l(results[0], doc["answers"])
    return {
        "cider": {"answer": results[0], "references": list(doc["answers"]), "image_id": doc["image_id"]},
        "rouge_l": _scored(doc, score),
        "prediction": {"rouge_l": score},
    }


def process_judged(doc: Mapping, results: Sequence[str]) -> dict:
    """Nothing yet: a judge reads these answers afterwards (`judge`)."""
    return {"answered": _scored(doc, bool(results[0].strip())), "prediction": {}}


def mean_score(items: Sequence[Mapping]) -> float:
    """The aggregation of the metrics: the mean over rows, or the ratio of two sums where each row brings both."""
    size = sum(item.get("of", 1.0) for item in items)
    return sum(item["score"] for item in items) / size if size else float("nan")


def mean_cider(items: Sequence[Mapping]) -> float:
    """The mean CIDEr-D over rows."""
    scores = cider([item["answer"] for item in items], [item["references"] for item in items])
    return sum(scores) / len(scores)


def _first_box(score: BoxScore) -> dict:
    return {
        "status": score.status,
        "predicted_xyxy": None if score.predicted_xyxy is None else list(score.predicted_xyxy),
    }


def _ratios(doc: Mapping, score) -> dict:
    return {
        "precision": _scored(doc, score.found, score.predicted),
        "recall": _scored(doc, score.found, score.true),
    }


def _exact_match(doc: Mapping, correct: bool) -> dict:
    return {"em": _scored(doc, correct), "prediction": {"correct": correct}}


def _scored(doc: Mapping, score: float, of: float | None = None) -> dict:
    # `score` and the cluster key `image_id` are the names lmms-eval reads for its own clustered standard error.
    item = {"score": float(score), "image_id": doc["image_id"]}
    return item if of is None else {**item, "of": float(of)}
