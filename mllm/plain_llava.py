"""LLaVAs of transformers itself, unchanged: opened and asked with their own processor, regions said in words."""

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from ..vision_towers import UserError
from ..vision_towers.errors import CANNOT_OPEN
from ..vision_towers.packaged import model_source
from .answers import Answer, Question, decode_answer
from .batched_reader import EncodedPicture, Prompt, prompt_ids
from .boxes import Boxes, ImageFrame, box_format
from .load import DTYPES, check_loaded, load_mllm, resolve_device
from .prompts import IMAGE_TOKEN, REGION_TOKEN, assistant_message, user_message
from .quantize import check_odd_layers, quantization

PLAIN_LLAVAS = ("llava", "llava_next", "llava_onevision")


def load_llava(
    name_or_path: str | Path, *, device: str = "auto", dtype: str = "auto", quant: str = "none"
) -> tuple[Any, Any]:
    """Open a plain LLaVA, or whatever `load_mllm` opens, ready to answer (eval mode).

    Args, errors: as `load_mllm`'s.
    """
    source = model_source(name_or_path)
    try:
        plain = AutoConfig.from_pretrained(source).model_type in PLAIN_LLAVAS
    except CANNOT_OPEN:
        plain = False  # a LoRA run; or nothing, and `load_mllm` says so
    if not plain:
        return load_mllm(name_or_path, device=device, dtype=dtype, quant=quant)
    if dtype not in ("auto", *DTYPES):
        raise UserError(f"dtype must be auto, {', '.join(DTYPES)}; got {dtype!r}.")
    place = torch.device(resolve_device(device))
    options: dict[str, Any] = {"dtype": DTYPES.get(dtype, "auto")}
    if quant != "none":
        compute = DTYPES.get(dtype, torch.float32 if place.type == "cpu" else torch.bfloat16)
        options = {
            "dtype": compute,
            "quantization_config": quantization(quant, compute),
            "device_map": {"": place},
        }
    loaded: Any = AutoModelForImageTextToText.from_pretrained(source, output_loading_info=True, **options)
    model, info = loaded
    check_loaded(str(source), info)
    check_odd_layers(model)
    return (model if quant != "none" else model.to(place)).eval(), AutoProcessor.from_pretrained(source)


class PlainLlavaReader:
    """Pixels, prompts and answers as the model's own processor makes them; see `batched_reader.Reader`.

    Args:
        box_format: the convention of its boxes, in prompts and answers; LLaVA-1.5 was trained on `norm01`.
    """

    region_token_id: int | None = None

    def __init__(self, model: Any, processor: Any, box_format: str = "norm01"):
        self.model, self.processor, self.box_format = model, processor, box_format
        self.image_token_id: int = model.config.image_token_id

    def picture(self, question: Question) -> Image.Image:
        return question.image

    def encode(self, pictures: Sequence[Image.Image]) -> list[EncodedPicture]:
        inputs = [self._pixels(picture) for picture in pictures]
        shapes = {tuple(one["pixel_values"].shape) for one in inputs}
        if len(shapes) == 1 and all(set(one) == {"pixel_values"} for one in inputs):
            rows = self._features(pixel_values=torch.cat([one["pixel_values"] for one in inputs]))
            return [EncodedPicture(one, None) for one in rows]
        return [EncodedPicture(torch.cat(list(self._features(**one))), None) for one in inputs]

    def _pixels(self, picture: Image.Image) -> dict[str, torch.Tensor]:
        """What `get_image_features` takes of the processor's output."""
        inputs = self.processor(images=picture, text=self.processor.image_token, return_tensors="pt")
        taken = inspect.signature(self.model.model.get_image_features).parameters
        return {
            name: value.to(self.model.device, self.model.dtype if value.is_floating_point() else None)
            for name, value in inputs.items()
            if name in taken
        }

    def _features(self, **pixels: torch.Tensor) -> Sequence[torch.Tensor]:
        return self.model.model.get_image_features(**pixels, return_dict=True).pooler_output

    def regions(self, picture: EncodedPicture, boxes: torch.Tensor) -> torch.Tensor:
        return picture.rows[:0]

    def prompt(self, question: Question, picture: EncodedPicture, answer: str | None) -> Prompt:
        frame = ImageFrame.identity(question.image.size)  # its conventions speak of the original
        text = self._write_regions(question, frame)
        asked = self._expand(self._chat(text, None), picture)
        answered = None if answer is None else self._expand(self._chat(text, answer), picture)
        ids, split = prompt_ids(self.processor.tokenizer, asked, answered, answer)
        return Prompt(ids, split, torch.zeros(0, 4), frame)

    def decode(self, ids: Sequence[int], probabilities: Sequence[float], frame: ImageFrame) -> Answer:
        return decode_answer(self.processor, ids, probabilities, frame, self.box_format)

    def _chat(self, text: str, answer: str | None) -> str:
        """The conversation in the model's own template, with one image placeholder."""
        if (self.processor.chat_template or self.processor.tokenizer.chat_template) is None:
            raise UserError(
                "the model has no chat template; set processor.chat_template to the one it was trained with."
            )
        turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]
        if answer is not None:
            turns.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        written = self.processor.apply_chat_template(turns, add_generation_prompt=answer is None)
        if self.processor.image_token in written:
            return written
        # A template of language models: it takes plain text.
        texts = [user_message(text, with_image=True)] + ([] if answer is None else [assistant_message(answer)])
        written = self.processor.apply_chat_template(texts, add_generation_prompt=answer is None)
        return written.replace(IMAGE_TOKEN, self.processor.image_token, 1)

    def _expand(self, written: str, picture: EncodedPicture) -> str:
        token = self.processor.image_token
        if (found := written.count(token)) != 1:
            raise UserError(f"a prompt about a picture holds {token} once, this one {found} times: {written!r}")
        return written.replace(token, token * len(picture.rows))

    def _write_regions(self, question: Question, frame: ImageFrame) -> str:
        """Each `<region>` as the coordinates of its box."""
        boxes = question.boxes if isinstance(question.boxes, Boxes) else Boxes(list(question.boxes))
        if (found := question.text.count(REGION_TOKEN)) != len(boxes):
            raise UserError(
                f"the prompt holds {found} {REGION_TOKEN} placeholders and comes with {len(boxes)} boxes; "
                f"give one box a placeholder: {question.text!r}"
            )
        text, spoken = question.text, box_format(self.box_format)
        for index in range(len(boxes)):
            text = text.replace(REGION_TOKEN, spoken.write(boxes[index : index + 1], frame), 1)
        return text
