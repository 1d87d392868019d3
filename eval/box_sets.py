"""Answers with several boxes: which of the true ones were found, which of the given ones are wrong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment

from ..mllm.boxes import Boxes, ParsedBoxes

FOUND_IOU = 0.5


@dataclass(frozen=True)
class SetScore:
    """status: as `BoxScore`'s. boxes: of the answer, original pixels; none unless status is "boxes". true: number of
    true boxes. found: how many of them have a box of their own with an IoU of at least `FOUND_IOU`."""

    status: str
    boxes: list[list[float]]
    true: int
    found: int

    @property
    def predicted(self) -> int:
        """Number of boxes in the answer."""
        return len(self.boxes)

    @property
    def exact(self) -> bool:
        """Everything was found, and nothing else was given."""
        return self.found == self.true == self.predicted

    @property
    def f1(self) -> float:
        """Harmonic mean of precision and recall of this answer alone."""
        return 2 * self.found / (self.true + self.predicted)


def score_set(parsed: ParsedBoxes, targets: Sequence[Sequence[float]]) -> SetScore:
    """The score of all boxes of an answer against all true ones (at least one), original pixels.

    Each true box is found by at most one box and each box finds at most one: the assignment with the most pairs, so the
    order of the answer does not matter and repeating a box costs precision.
    """
    boxes = [list(box) for box in parsed.boxes] if parsed.status == "boxes" else []
    pairs = Boxes(boxes).iou(Boxes(list(targets))) >= FOUND_IOU
    rows, columns = linear_sum_assignment(pairs, maximize=True)
    return SetScore(parsed.status, boxes, len(targets), int(np.asarray(pairs)[rows, columns].sum()))


def set_fields(score: SetScore) -> dict:
    """The fields of a sample that the metrics of several boxes are made from."""
    return {
        "status": score.status,
        "predicted_boxes": score.boxes,
        "parsed": score.status == "boxes",
        "found": score.found,
        "predicted": score.predicted,
        "true": score.true,
        "twice_found": 2 * score.found,
        "predicted_and_true": score.predicted + score.true,
        "f1": score.f1,
    }
