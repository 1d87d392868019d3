"""A question about a picture, and the answer to it: text with boxes and scores."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from .boxes import ImageFrame, ParsedBoxes, box_format, score_boxes
from .processing import BoxesLike, RegionLlavaProcessor
from .prompts import user_message


@dataclass(frozen=True)
class Question:
    """One question about one picture.

    Args:
        image: upright RGB.
        text: with one `<region>` a box.
        boxes: xyxy in pixels of `image`.
    """

    image: Image.Image
    text: str
    boxes: BoxesLike = ()


@dataclass(frozen=True)
class Answer:
    """The text, and the boxes it holds in pixels of the picture; a box's score is its tokens' mean probability."""

    text: str
    boxes: ParsedBoxes


@torch.inference_mode()
def answer_whole(model: Any, processor: Any, questions: Sequence[Question], max_new_tokens: int) -> list[Answer]:
    """Answer a batch (greedy), each prompt from its beginning, nothing shared: for models whose prompts cannot be taken
    apart. Pictures of one input size go together."""
    answers: dict[int, Answer] = {}
    sizes = [processor.frame(question.image.size).input_size for question in questions]
    for size in dict.fromkeys(sizes):
        rows = [row for row, other in enumerate(sizes) if other == size]
        found = _answer_one_size(model, processor, [questions[row] for row in rows], max_new_tokens)
        answers |= zip(rows, found, strict=True)
    return [answers[row] for row in range(len(questions))]


def _answer_one_size(model: Any, processor: Any, batch: Sequence[Question], max_new_tokens: int) -> list[Answer]:
    inputs = processor(
        images=[question.image for question in batch],
        text=[user_prompt(processor, question.text) for question in batch],
        boxes=[question.boxes for question in batch],
        padding=True,
        padding_side="left",
    )
    output = model.generate(
        **model_inputs(model, inputs),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    new_ids = output.sequences[:, inputs["input_ids"].shape[1] :]
    steps = zip(output.logits, new_ids.T, strict=True)
    chosen = torch.stack([step.float().softmax(-1).gather(-1, ids[:, None])[:, 0] for step, ids in steps], dim=1)
    return [
        decode_answer(processor, ids.tolist(), probs.tolist(), processor.frame(question.image.size))
        for ids, probs, question in zip(new_ids, chosen, batch, strict=True)
    ]


def user_prompt(processor: RegionLlavaProcessor, text: str) -> str:
    """One user turn about a picture, in the model's own chat template, open for the answer."""
    return processor.apply_chat_template([user_message(text, with_image=True)], add_generation_prompt=True)


def model_inputs(model, inputs) -> dict[str, torch.Tensor]:
    """Move a processor's batch to the model; only pixels take its dtype (boxes must stay float32)."""
    # By name: tokenizers add fields of their own that no LLaVA takes.
    taken = ("input_ids", "attention_mask", "pixel_values", "image_sizes", "boxes", "region_counts")
    return {
        name: inputs[name].to(model.device, model.dtype if name == "pixel_values" else None)
        for name in taken
        if name in inputs
    }


def decode_answer(
    processor: Any,
    ids: Sequence[int],
    probabilities: Sequence[float],
    frame: ImageFrame,
    convention: str | None = None,
) -> Answer:
    """Generated ids -> text, its boxes, and their scores.

    convention: of the boxes, a name of `boxes.BOX_FORMATS`; the processor's own when absent.
    """
    spoken: str = convention or processor.box_format
    ids = text_ids(processor, ids, spoken)
    # Where each token's characters end: tokens can share characters (bytes), so prefixes are decoded, not tokens.
    ends = [len(processor.tokenizer.decode(ids[: i + 1])) for i in range(len(ids))]
    text = processor.tokenizer.decode(ids)
    spans = list(zip([0, *ends[:-1]], ends, strict=True)) if ids else []
    parsed = box_format(spoken).parse(text, frame)
    return Answer(text.strip(), score_boxes(parsed, spans, list(probabilities[: len(ids)])))


def text_ids(processor: Any, ids: Sequence[int], convention: str | None = None) -> list[int]:
    """The answer itself: generated ids up to the first special token (end of turn, padding)."""
    special = end_ids(processor, convention)
    end = next((i for i, token in enumerate(ids) if token in special), len(ids))
    return list(ids[:end])


def end_ids(processor: Any, convention: str | None = None) -> set[int]:
    """Ids that end an answer: all special tokens, but for the box format's own tags, which are part of it."""
    tokenizer, marks = processor.tokenizer, box_format(convention or processor.box_format).syntax.reserved
    return {i for i in tokenizer.all_special_ids if tokenizer.convert_ids_to_tokens(i) not in marks}
