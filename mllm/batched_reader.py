"""Questions and pictures as the tensors of a model, piece by piece: what `SharedAnswers` puts together."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from PIL import Image

from ..vision_towers import TowerFeatures, describe_tower
from .answers import Answer, Question, decode_answer, model_inputs, user_prompt
from .bos import adds_special_tokens
from .boxes import Boxes, ImageFrame
from .draw import OVERLAY_COLORS, draw_boxes
from .processing import RegionLlavaProcessor
from .prompts import assistant_message, user_message


@dataclass(frozen=True)
class Prompt:
    """A question in the model's terms.

    ids: with every placeholder repeated as often as it takes embeddings. split: how many of them the question has;
    the rest is an answer to be scored. boxes: `(R, 4)` float32 in input pixels, one a region placeholder in `ids`.
    frame: of the picture.
    """

    ids: list[int]
    split: int
    boxes: torch.Tensor
    frame: ImageFrame


@dataclass(frozen=True)
class EncodedPicture:
    """rows: `(image tokens, text width)`. features: what later boxes are read from, None where none can be."""

    rows: torch.Tensor
    features: TowerFeatures | None


class Reader(Protocol):
    """How one kind of model takes pictures and questions."""

    image_token_id: int
    region_token_id: int | None  # None: regions are text

    def picture(self, question: Question) -> Image.Image:
        """What the model is shown."""
        ...

    def encode(self, pictures: Sequence[Image.Image]) -> list[EncodedPicture]:
        """Run the tower, once a picture."""
        ...

    def regions(self, picture: EncodedPicture, boxes: torch.Tensor) -> torch.Tensor:
        """Rows `(R, text width)` of boxes `(R, 4)` on a picture that was encoded."""
        ...

    def prompt(self, question: Question, picture: EncodedPicture, answer: str | None) -> Prompt:
        """The question, open for the answer, or with this one behind it."""
        ...

    def decode(self, ids: Sequence[int], probabilities: Sequence[float], frame: ImageFrame) -> Answer:
        """Generated ids as an answer."""
        ...


class RegionReader:
    """Of the models of `load_mllm`: regions are read from what the tower has seen already."""

    def __init__(self, model: Any, processor: RegionLlavaProcessor):
        self.model, self.processor = model, processor
        self.image_token_id = processor.image_token_id
        self.region_token_id: int | None = processor.region_token_id

    def picture(self, question: Question) -> Image.Image:
        if self.processor.region_prompt != "overlay" or not len(question.boxes):
            return question.image
        return draw_boxes(question.image, _boxes(question), OVERLAY_COLORS)

    def encode(self, pictures: Sequence[Image.Image]) -> list[EncodedPicture]:
        pixels = [self.processor.pixels(picture) for picture in pictures]
        encoded: dict[int, EncodedPicture] = {}
        for shape in dict.fromkeys(array.shape for array in pixels):  # the tower takes one size at a time
            rows = [row for row, array in enumerate(pixels) if array.shape == shape]
            sizes = [pictures[row].size for row in rows]
            inputs = self.processor.picture_inputs([pixels[row] for row in rows], sizes)
            encoded |= zip(rows, self._encode(model_inputs(self.model, inputs), len(rows)), strict=True)
        return [encoded[row] for row in range(len(pictures))]

    def _encode(self, inputs: dict[str, torch.Tensor], count: int) -> list[EncodedPicture]:
        inner, config = self.model.model, self.model.config
        layer = config.vision_feature_layer
        layers = {*([layer] if isinstance(layer, int) else layer)}
        needed = inner.vision_tower.region_feature_layers if self.processor.embeds_regions else ()
        output = inner.get_image_features(**inputs, output_hidden_states=sorted(layers | {*needed}), return_dict=True)
        assert output.pooler_output is not None
        if not needed:
            return [EncodedPicture(rows, None) for rows in output.pooler_output]
        height, width = inputs["pixel_values"].shape[-2:]
        whole = TowerFeatures.from_output(output, (height, width), describe_tower(config.vision).patch_size)
        # Each picture's own rows (one a view), cloned: views would keep the whole batch alive.
        hidden = {index: whole.hidden[index].chunk(count) for index in needed}
        return [
            EncodedPicture(
                rows,
                TowerFeatures(
                    {index: parts[row].clone() for index, parts in hidden.items()}, whole.grid_hw, whole.input_hw
                ),
            )
            for row, rows in enumerate(output.pooler_output)
        ]

    def regions(self, picture: EncodedPicture, boxes: torch.Tensor) -> torch.Tensor:
        if picture.features is None or not len(boxes):
            return picture.rows[:0]
        return self.model.model.encode_more_regions(picture.features, boxes[None].to(self.model.device))

    def prompt(self, question: Question, picture: EncodedPicture, answer: str | None) -> Prompt:
        processor = self.processor
        frame, regions = processor.frame(question.image.size), _boxes(question)
        asked = processor.write(user_prompt(processor, question.text), frame, regions)
        boxes = processor.to_input(regions, frame) if processor.embeds_regions else torch.zeros(0, 4)
        answered = None
        if answer is not None:
            turns = [user_message(question.text, with_image=True), assistant_message(answer)]
            answered = processor.write(processor.apply_chat_template(turns), frame, regions)
        ids, split = prompt_ids(processor.tokenizer, asked, answered, answer)
        return Prompt(ids, split, boxes, frame)

    def decode(self, ids: Sequence[int], probabilities: Sequence[float], frame: ImageFrame) -> Answer:
        return decode_answer(self.processor, ids, probabilities, frame)


def prompt_ids(tokenizer: Any, asked: str, answered: str | None, answer: str | None) -> tuple[list[int], int]:
    """The ids of a question and of the answer behind it, and where the answer begins.

    Args:
        asked: the question, open for the answer. answered: the conversation with the answer, as the chat template
            writes it. answer: the answer alone, for a template that rewrites the question once it is answered.
    """
    special = adds_special_tokens(tokenizer, asked)
    question = tokenizer(asked, add_special_tokens=special)["input_ids"]
    if answer is None:
        return question, len(question)
    if answered is not None and answered.startswith(asked):
        whole = tokenizer(answered, add_special_tokens=special)["input_ids"]
        if whole[: len(question)] == question and len(whole) > len(question):
            return whole, len(question)
    return question + tokenizer(answer, add_special_tokens=False)["input_ids"], len(question)


def _boxes(question: Question) -> Boxes:
    return question.boxes if isinstance(question.boxes, Boxes) else Boxes(list(question.boxes))
