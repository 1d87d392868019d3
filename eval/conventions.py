"""Declared conventions: how a model that is not ours is asked about boxes, and how its boxes are read. One each, never
two.

A convention says what picture is sent, how boxes stand in text, and in which words questions are put. It is bound to
the rows of a task (`bind`), so that every model class of lmms-eval can answer them: the question is plain text, the
picture
is ready, and the score reads the answer by the convention that the row names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Literal

from PIL import Image

from ..mllm.boxes import Boxes, ImageFrame, ParsedBoxes, box_format, letterbox_image
from ..mllm.prompts import LOCATE, REGION_TOKEN
from ..train_stages.masks import decode_mask
from ..vision_towers.errors import UserError
from .marks import Mark, draw_marks, mark_names
from .scoring import read_boxes
from .task_kinds import ALL_TASKS
from .task_rows import TaskRow

OWN = ""  # the convention of rows that our own class is asked: `<region>` prompts, answers restated in `ANSWER_FORMAT`


@dataclass(frozen=True)
class Convention:
    """How one family of models is asked.

    Attributes:
        name: key in `CONVENTIONS`.
        box_format: name out of `mllm.boxes.BOX_FORMATS`; its frame is the picture that is sent.
        picture: "original"; "square": padded to a square in CLIP's mean colour, as LLaVA does before it resizes (the
            Hugging Face processor would crop the sides off instead); "multiple": both sides brought to a multiple of
            `factor`, within `min_pixels` and `max_pixels`, by Qwen's own rule. Qwen2.5-VL speaks in pixels of what its
            processor makes of the picture, and of such a picture it makes nothing else.
        regions: how a question shows a region: "coords" (written in `box_format`) or "marks" (drawn into the picture).
        locate: asks for one box, with {phrase}. locate_all: asks for several.
        short: appended to questions that want a word or a phrase.
        factor, min_pixels, max_pixels: of the picture "multiple".
    """

    name: str
    box_format: str
    picture: Literal["original", "square", "multiple"] = "original"
    regions: Literal["coords", "marks"] = "coords"
    locate: str = LOCATE
    locate_all: str = LOCATE
    short: str = " Answer with a single word or a short phrase."
    factor: int = 28
    min_pixels: int = 256 * 28 * 28
    max_pixels: int = 1280 * 28 * 28

    def frame(self, size: tuple[int, int]) -> ImageFrame:
        """From an original of `size` = (width, height) to the picture that is sent."""
        if self.picture == "square":
            return ImageFrame.letterbox(size, max(size))
        return ImageFrame.resize(size, self._size(size) if self.picture == "multiple" else size)

    def show(self, image: Image.Image) -> Image.Image:
        """The picture that is sent."""
        if self.picture == "square":
            return letterbox_image(image, max(image.size), _CLIP_MEAN)[0]
        sent = self.frame(image.size).input_size
        return image if sent == image.size else image.resize(sent, Image.Resampling.BICUBIC)

    def say(self, box_xyxy: Sequence[float], size: tuple[int, int]) -> str:
        """The coordinates of a box of the original image, in brackets, as a question gives them."""
        text = box_format(self.box_format).write(Boxes([box_xyxy]), self.frame(size))
        found = _BRACKETS.search(text)  # without the JSON around them
        return found[0] if found else text

    def _size(self, size: tuple[int, int]) -> tuple[int, int]:
        from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

        height, width = smart_resize(size[1], size[0], self.factor, self.min_pixels, self.max_pixels)
        return width, height


_BRACKETS = re.compile(r"\[[^\[\]]*\]")
_CLIP_MEAN = (122, 116, 104)
_JSON_ONE = 'Locate {phrase} in the image. Answer with its bounding box as JSON: [{{"bbox_2d": [x1, y1, x2, y2]}}].'
_JSON_ALL = (
    "Locate every instance of {phrase} in the image. Answer with their bounding boxes as JSON: "
    '[{{"bbox_2d": [x1, y1, x2, y2]}}, ...].'
)
_NONE = ' If the image shows no such thing, answer "none".'
_THOUSAND_ONE = (
    "Where is {phrase} in the image? Answer with its bounding box as [x1, y1, x2, y2]: whole numbers from 0 to 1000, "
    "thousandths of the image's width and height."
)
_THOUSAND_ALL = (
    "Where is {phrase} in the image? Answer with the bounding box of every instance as [x1, y1, x2, y2], one after the "
    "other: whole numbers from 0 to 1000, thousandths of the image's width and height."
)

CONVENTIONS: dict[str, Convention] = {
    each.name: each
    for each in (
        # LLaVA-1.5's own referring prompt (its RefCOCO training turns), two decimals in the padded square.
        Convention(
            "llava15",
            "norm01",
            picture="square",
            locate="Please provide the bounding box coordinate of the region this sentence describes: {phrase}",
            locate_all="Please provide the bounding box coordinates of all regions this sentence describes: {phrase}",
        ),
        Convention("qwen2_5_vl", "qwen2_5_json", "multiple", locate=_JSON_ONE + _NONE, locate_all=_JSON_ALL + _NONE),
        Convention("qwen3_vl", "qwen3_json", locate=_JSON_ONE + _NONE, locate_all=_JSON_ALL + _NONE),
        # For models that were told nothing else: the convention is explained in the question, regions are drawn.
        Convention(
            "int1000", "int1000", regions="marks", locate=_THOUSAND_ONE + _NONE, locate_all=_THOUSAND_ALL + _NONE
        ),
    )
}
# lmms-eval's model id -> its convention. vllm and OpenAI endpoints can hold any model: there the user declares one.
OF_MODEL_CLASS = {
    "llava_hf": "llava15",
    "llava": "llava15",
    "qwen2_5_vl": "qwen2_5_vl",
    "qwen3_vl": "qwen3_vl",
}


def convention(name: str) -> Convention:
    """The convention of that name. A UserError on an unknown one names them all."""
    if name not in CONVENTIONS:
        near = get_close_matches(name, CONVENTIONS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UserError(f"there is no convention {name!r}; {hint}choose one of {', '.join(CONVENTIONS)}.")
    return CONVENTIONS[name]


def convention_of(model_class: str, name: str | None = None) -> Convention:
    """The convention declared by `name`, else by lmms-eval's model id. A UserError where nobody declares one."""
    if name is not None:
        return convention(name)
    if model_class not in OF_MODEL_CLASS:
        raise UserError(
            f"nothing says how boxes stand in the answers of lmms-eval's model {model_class}; declare it with "
            f"--convention: {', '.join(CONVENTIONS)}."
        )
    return CONVENTIONS[OF_MODEL_CLASS[model_class]]


def bind(task: str, row: TaskRow, how: Convention) -> TaskRow:
    """The row as this convention asks it: the question without `<region>`, everything else as it was."""
    kind = ALL_TASKS[task]
    if row.phrase:
        question = how.locate_all if kind in ("several", "counting") else how.locate
        return replace(row, question=question.format(phrase=row.phrase))
    named = _region_names(row, how)
    question = row.question
    for name in named:
        question = question.replace(REGION_TOKEN, name, 1)
    return replace(row, question=question + (how.short if kind in ("referring", "reading", "classification") else ""))


def _region_names(row: TaskRow, how: Convention) -> list[str]:
    if how.regions == "marks":
        return mark_names(_marks(row.prompt_boxes, row.point_xy, row.shape))
    return [f"the region {how.say(box, (row.width, row.height))}" for box in row.prompt_boxes]


def shown_picture(doc: Mapping, image: Image.Image) -> Image.Image:
    """What a model is shown of the row's image (upright RGB). Unchanged where the row names no convention."""
    name = doc.get("convention", OWN)
    if name == OWN:
        return image
    how = CONVENTIONS[name]
    if how.regions == "marks" and doc["prompt_boxes"]:
        size = (image.height, image.width)
        mask = decode_mask(size, doc["shape"]) if doc["shape"] else None
        image = draw_marks(image, _marks(doc["prompt_boxes"], doc["point_xy"], doc["shape"]), mask)
    return how.show(image)


def _marks(boxes: Sequence[Sequence[float]], point_xy: Sequence[float], shape: str) -> list[Mark]:
    kind: Literal["box", "point", "shape"] = "point" if point_xy else "shape" if shape else "box"
    return [Mark(kind, tuple(box)) for box in boxes]


def parse_answer(doc: Mapping, answer: str) -> ParsedBoxes:
    """The boxes of an answer in original pixels, by the one convention that the row declares. Never raises.

    An empty answer of a model that is not ours is malformed, not "nothing fits": lmms-eval's classes turn errors into
    empty answers.
    """
    size = (doc["width"], doc["height"])
    name = doc.get("convention", OWN)
    if name == OWN:
        return read_boxes(answer, size)
    if not answer.strip():
        return ParsedBoxes("malformed")
    how = CONVENTIONS[name]
    return box_format(how.box_format).parse(answer, how.frame(size))
