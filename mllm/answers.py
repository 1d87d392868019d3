"""Many questions at once: prompts in, answers with boxes and scores out."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from PIL import Image

from .boxes import ImageFrame, ParsedBoxes, box_format, score_boxes
from .modeling import RegionLlavaForConditionalGeneration
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


def answer_questions(
    model: RegionLlavaForConditionalGeneration,
    processor: RegionLlavaProcessor,
    questions: Sequence[Question],
    *,
    max_new_tokens: int = 48,
    batch_size: int = 16,
) -> list[Answer]:
    """Answer each question by itself (greedy), `batch_size` at a time.

    Raises:
        UserError: a question whose `<region>` placeholders and boxes differ in number, or a box outside its picture.
    """
    answers: list[Answer] = []
    for batch in _batches(processor, questions, batch_size):
        answers += _answer_batch(model, processor, batch, max_new_tokens)
    return answers


def _batches(processor: RegionLlavaProcessor, questions: Sequence[Question], size: int) -> Iterator[list[Question]]:
    """Consecutive questions of one input size; with letterboxing all inputs have one."""
    batch: list[Question] = []
    for question in questions:
        frame_size = processor.frame(question.image.size).input_size
        if batch and (len(batch) == size or frame_size != processor.frame(batch[0].image.size).input_size):
            yield batch
            batch = []
        batch.append(question)
    if batch:
        yield batch


@torch.inference_mode()
def _answer_batch(model, processor, batch: Sequence[Question], max_new_tokens: int) -> list[Answer]:
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
        return_dict_in_generate=True,
        output_logits=True,
    )
    new_ids = output.sequences[:, inputs["input_ids"].shape[1] :]
    probabilities = torch.stack([step.float().softmax(-1) for step in output.logits], dim=1)
    chosen = probabilities.gather(-1, new_ids[..., None])[..., 0]
    return [
        decode_answer(processor, ids.tolist(), probs.tolist(), processor.frame(question.image.size))
        for ids, probs, question in zip(new_ids, chosen, batch, strict=True)
    ]


def user_prompt(processor: RegionLlavaProcessor, text: str) -> str:
    """One user turn about a picture, in the model's own chat template, open for the answer."""
    return processor.apply_chat_template([user_message(text, with_image=True)], add_generation_prompt=True)


def model_inputs(model, inputs) -> dict[str, torch.Tensor]:
    """Move a processor's batch to the model; only pixels take its dtype (boxes must stay float32)."""
    moved = {
        name: inputs[name].to(model.device)
        for name in ("input_ids", "attention_mask", "boxes", "region_counts")
        if name in inputs
    }
    if "pixel_values" in inputs:
        moved["pixel_values"] = inputs["pixel_values"].to(model.device, model.dtype)
    return moved


def decode_answer(
    processor: RegionLlavaProcessor, ids: Sequence[int], probabilities: Sequence[float], frame: ImageFrame
) -> Answer:
    """Generated ids -> text, its boxes, and their scores."""
    ids = text_ids(processor, ids)
    # Where each token's characters end: tokens can share characters (bytes), so prefixes are decoded, not tokens.
    ends = [len(processor.tokenizer.decode(ids[: i + 1])) for i in range(len(ids))]
    text = processor.tokenizer.decode(ids)
    spans = list(zip([0, *ends[:-1]], ends, strict=True)) if ids else []
    parsed = processor.parse_boxes(text, frame)
    return Answer(text.strip(), score_boxes(parsed, spans, list(probabilities[: len(ids)])))


def text_ids(processor: RegionLlavaProcessor, ids: Sequence[int]) -> list[int]:
    """The answer itself: generated ids up to the first special token (end of turn, padding)."""
    tokenizer, marks = processor.tokenizer, box_format(processor.box_format).syntax.reserved
    # A tokenizer may hold the box format's own tags as special tokens: those are part of the answer.
    special = {i for i in tokenizer.all_special_ids if tokenizer.convert_ids_to_tokens(i) not in marks}
    end = next((i for i, token in enumerate(ids) if token in special), len(ids))
    return list(ids[:end])
