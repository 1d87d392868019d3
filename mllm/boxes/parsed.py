"""What came out of an answer text, and how sure the model was of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from ...vision_towers.errors import UserError
from .boxes import Boxes

Status = Literal["boxes", "none", "malformed"]


@dataclass(frozen=True)
class ParsedBoxes:
    """The boxes of one answer.

    Attributes:
        status: "boxes" (one or more), "none" (the text holds nothing that tries to be a box, like the word "none"), or
            "malformed" (it holds something that tries to and is not one; no boxes are returned then).
        boxes: `(N, 4)` original pixels, always inside the image, in the order of the text.
        spans: for every box the `(start, end)` characters of its coordinates in the text.
        scores: for every box the mean probability of its tokens; None until `score_boxes` fills it in.
    """

    status: Status
    boxes: Boxes = field(default_factory=Boxes.empty)
    spans: list[tuple[int, int]] = field(default_factory=list)
    scores: list[float] | None = None


def score_boxes(
    parsed: ParsedBoxes, token_spans: Sequence[tuple[int, int]], probabilities: Sequence[float]
) -> ParsedBoxes:
    """Give every box the mean probability of the tokens that wrote its coordinates.

    Args:
        parsed: the result of `BoxFormat.parse`.
        token_spans: for every generated token the `(start, end)` characters it wrote in the parsed text.
        probabilities: for every generated token its probability, 0-1.

    Returns:
        The same boxes with `scores`.

    Raises:
        UserError: the two lists differ in length, or no token touches a box (spans of another text).
    """
    if len(token_spans) != len(probabilities):
        raise UserError(f"{len(token_spans)} token spans came with {len(probabilities)} probabilities; give one each.")
    tokens = np.array(token_spans, dtype=np.int64).reshape(-1, 2)
    values = np.array(probabilities, dtype=np.float64)
    scores = []
    for row, (start, end) in enumerate(parsed.spans):
        inside = (np.minimum(tokens[:, 1], end) - np.maximum(tokens[:, 0], start)) > 0
        if not inside.any():
            raise UserError(
                f"no token lies on box {row} (characters {start}-{end}); give the spans of the parsed text."
            )
        scores.append(float(values[inside].mean()))
    return replace(parsed, scores=scores)
