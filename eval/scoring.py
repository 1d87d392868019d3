"""From an answer to a score. One convention for boxes, the first box, no second chances.

Nothing here imports lmms-eval, and nothing here raises on any answer text.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..mllm.boxes import Boxes, ImageFrame, ParsedBoxes, box_format
from ..mllm.prompts import NO_BOX
from ..train_stages.phrases import normalise_phrase
from .intervals import ratio_interval
from .task_kinds import METRICS, UNBOUNDED

# The convention of every answer that is scored: [x1, y1, x2, y2] in thousandths of the original image. A model that is
# trained on another one has its boxes restated (`restate_boxes`): its own numbers may lie in a frame (padded, resized)
# that only the model's processor knows.
ANSWER_FORMAT = "int1000"
UNREADABLE = "[unreadable]"  # stands for an answer that its own convention could not read; malformed here as well


def restate_boxes(text: str, parsed: ParsedBoxes, own_format: str, size: tuple[int, int]) -> str:
    """An answer about boxes in `ANSWER_FORMAT`, whatever the model's own convention is.

    Args:
        text: the answer as the model wrote it; returned untouched when its convention is `ANSWER_FORMAT` already.
        parsed: what the model's own convention made of it, boxes in pixels of the original image.
        own_format: name of the model's convention.
        size: (width, height) of the original image, pixels.

    Returns the boxes rounded to the nearest thousandth, `NO_BOX`, or `UNREADABLE`: text that its own convention cannot
    read must not be read by another one.
    """
    if own_format == ANSWER_FORMAT:
        return text
    if parsed.status == "none":
        return NO_BOX
    if parsed.status == "malformed":
        return UNREADABLE
    return box_format(ANSWER_FORMAT).write(parsed.boxes, ImageFrame.identity(size))


@dataclass(frozen=True)
class BoxScore:
    """iou: of the first box with the target, 0 without a box. predicted_xyxy: original pixels, or None.

    status: "boxes", "none" (nothing in the answer tries to be a box), "malformed" (something does and is not one).
    """

    status: str
    predicted_xyxy: tuple[float, float, float, float] | None
    iou: float

    @property
    def parsed(self) -> bool:
        """A box could be read."""
        return self.status == "boxes"

    @property
    def correct(self) -> bool:
        """IoU of at least 0.5."""
        return self.iou >= 0.5


def score_box(predicted_xyxy: Sequence[float], target_xyxy: Sequence[float]) -> BoxScore:
    """The score of one box against one target, both xyxy in original pixels."""
    x1, y1, x2, y2 = (float(edge) for edge in predicted_xyxy)
    iou = float(Boxes([[x1, y1, x2, y2]]).iou(Boxes([list(target_xyxy)]))[0, 0])
    return BoxScore("boxes", (x1, y1, x2, y2), iou)


def score_grounding(answer: str, target_xyxy: Sequence[float], size: tuple[int, int]) -> BoxScore:
    """The score of an answer in `ANSWER_FORMAT`: its FIRST box counts, whatever follows.

    Args:
        answer: the text, already restated (`restate_boxes`) if the model speaks another convention.
        target_xyxy: the true box, original pixels.
        size: (width, height) of the original image, pixels.

    An answer without a readable box, "none" among them (every row has exactly one true box), scores IoU 0. So does one
    with a malformed box anywhere, as one that was cut off in the middle of its second.
    """
    return score_first_box(read_boxes(answer, size), target_xyxy)


def read_boxes(answer: str, size: tuple[int, int]) -> ParsedBoxes:
    """The boxes of an answer in `ANSWER_FORMAT`, original pixels. size: (width, height) of the original image."""
    return box_format(ANSWER_FORMAT).parse(answer, ImageFrame.identity(size))


def score_first_box(parsed: ParsedBoxes, target_xyxy: Sequence[float]) -> BoxScore:
    """As `score_grounding`, of an answer whose boxes are read already."""
    return score_box(parsed.boxes[0], target_xyxy) if parsed.status == "boxes" else BoxScore(parsed.status, None, 0.0)


def score_absent(answer: str, size: tuple[int, int]) -> BoxScore:
    """What an answer about a phrase that nothing fits says: status "none" is right. See `score_grounding`."""
    return score_rejection(read_boxes(answer, size))


def score_rejection(parsed: ParsedBoxes) -> BoxScore:
    """As `score_absent`, of an answer whose boxes are read already."""
    return BoxScore(parsed.status, parsed.boxes[0] if parsed.status == "boxes" else None, 0.0)


def score_phrase(answer: str, true_phrases: Sequence[str]) -> bool:
    """Is the answer among the phrases that are true of the asked box alone?

    Both sides are folded by `normalise_phrase` (case, Unicode composition, runs of white space), and one full stop at
    the end is dropped, since an answer may be a sentence. Articles and synonyms are not touched.
    """
    return _without_stop(answer) in {_without_stop(phrase) for phrase in true_phrases}


def score_text(answer: str, transcripts: Sequence[str]) -> bool:
    """Does the answer equal a transcript? Case, Unicode composition and runs of white space are folded, no more."""
    return normalise_phrase(answer) in {normalise_phrase(transcript) for transcript in transcripts}


def _without_stop(text: str) -> str:
    return normalise_phrase(text).removesuffix(".").rstrip()


def summarise(kind: str, samples: Sequence[Mapping]) -> dict:
    """The figures of one task: `{"n", metric: mean, ..., "ci95": {metric: [low, high]}}`.

    Args:
        kind: a key of `METRICS`.
        samples: each with `image_id` (the cluster of the intervals) and the fields that `METRICS` names.

    Without samples every figure, and `ci95`, is None: there is nothing to say, which is not the same as 0. So is a
    ratio of sums whose lower one is 0 (the precision of no box at all).
    """
    fields = METRICS[kind]
    if not samples:
        return {"n": 0, **dict.fromkeys(fields), "ci95": None}
    clusters = [sample["image_id"] for sample in samples]
    figures: dict = {"n": len(samples)}
    intervals: dict = {}
    for metric, field in fields.items():
        over, under = field if isinstance(field, tuple) else (field, None)
        values = [float(sample[over]) for sample in samples]
        sizes = [1.0 if under is None else float(sample[under]) for sample in samples]
        figures[metric] = sum(values) / sum(sizes) if sum(sizes) else None
        if figures[metric] is not None:
            share = metric not in UNBOUNDED
            intervals[metric] = list(ratio_interval(values, sizes, clusters, share=share))
    return {**figures, "ci95": intervals}
