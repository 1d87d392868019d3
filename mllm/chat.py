"""A conversation about one picture: the tower runs once, the KV prefix is kept, tokens stream."""

from collections.abc import Iterator
from dataclasses import dataclass
from threading import Event, Thread

import torch
from PIL import Image
from transformers import DynamicCache, StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ..vision_towers import TowerFeatures, UserError, describe_tower
from .answers import Answer, decode_answer, end_ids, model_inputs, text_ids
from .bos import adds_special_tokens
from .boxes import Boxes
from .draw import OVERLAY_COLORS, draw_boxes
from .load import RegionMLLM
from .processing import BoxesLike, RegionLlavaProcessor
from .prompts import assistant_message, user_message
from .region_model import encoded_rows


@dataclass
class _Prefix:
    """What the KV cache already holds: the conversation up to the last answer, as text and as ids."""

    text: str
    ids: torch.Tensor
    cache: DynamicCache


class ChatSession:
    """Turns about one picture.

    With `region_prompt` "overlay" boxes are part of the picture: it is encoded again in every turn that names new ones.

    Args:
        model, processor: from `load_mllm`.
        image: upright RGB.
        max_new_tokens: longest answer; may be changed between turns.
    Attributes:
        frame: between the picture and the tower's input.
        features: what the tower gave: the layers that the language model and the region readout take.
    """

    def __init__(
        self,
        model: RegionMLLM,
        processor: RegionLlavaProcessor,
        image: Image.Image,
        *,
        max_new_tokens: int = 128,
    ):
        self.model, self.max_new_tokens, self._image = model, max_new_tokens, image
        self.frame = processor.frame(image.size)
        self.restart(processor)
        self._encode(())

    def restart(self, processor: RegionLlavaProcessor) -> None:
        """Forget the conversation and keep the encoded picture.

        processor: the session's, or a copy of it with another `region_prompt`.
        """
        self.processor = processor
        self._messages: list[dict] = []
        self._boxes: list[tuple[float, ...]] = []
        self._prefix = self._empty_prefix()

    def ask(self, text: str, boxes: BoxesLike = ()) -> Answer:
        """One turn, answered whole. See `stream`."""
        for _ in self.stream(text, boxes):
            pass
        return self.last_answer

    def stream(self, text: str, boxes: BoxesLike = ()) -> Iterator[str]:
        """One turn, its answer piece by piece; afterwards `last_answer` holds it with boxes and scores.

        A generator that is closed early stops the model and leaves the conversation as it was before this turn.

        Args:
            text: the question, with one `<region>` a box.
            boxes: xyxy in pixels of the picture.
        Raises:
            UserError: placeholders and boxes differ in number, a box outside the picture, a conversation longer than
                the language model reads, or more boxes than "overlay" has colours.
        """
        new = [tuple(box) for box in (boxes if isinstance(boxes, Boxes) else Boxes(list(boxes)))]
        question = user_message(text, with_image=not self._messages)
        prompt = self.processor.apply_chat_template([*self._messages, question], add_generation_prompt=True)
        if self._draw([*self._boxes, *new]) or not prompt.startswith(self._prefix.text):
            # Some templates rewrite earlier turns (they trim answers, say): then nothing can be kept.
            self._prefix = self._empty_prefix()
        fresh = not self._prefix.text
        regions = Boxes([*self._boxes, *new] if fresh else new)
        ids = torch.cat([self._prefix.ids, self._tokenise(prompt[len(self._prefix.text) :], regions, fresh)], dim=1)
        self._check_length(ids.shape[1])
        encoded = self._encoded(regions, with_image=fresh)

        answer_ids: list[int] = []
        yield from self._generate(ids, encoded, answer_ids)
        self.last_answer_ids = kept = text_ids(self.processor, answer_ids)
        answer_text = self.processor.tokenizer.decode(kept)
        self._messages += [question, assistant_message(answer_text)]
        self._boxes += new
        self._prefix.text = prompt + answer_text
        self._prefix.ids = torch.cat([ids, ids.new_tensor([kept])], dim=1)

    def _draw(self, boxes: list[tuple[float, ...]]) -> bool:
        """Whether the picture had to be encoded again, because other boxes belong into it."""
        wanted = tuple(boxes) if self.processor.region_prompt == "overlay" else ()
        if wanted == self._drawn:
            return False
        if len(wanted) > len(OVERLAY_COLORS):
            raise UserError(
                f"region_prompt overlay has {len(OVERLAY_COLORS)} colours and the conversation {len(wanted)} boxes; "
                "start another conversation."
            )
        self._encode(wanted)
        return True

    def _check_length(self, tokens: int) -> None:
        longest = getattr(self.model.config.text, "max_position_embeddings", None)
        if longest is not None and tokens + self.max_new_tokens > longest:
            raise UserError(
                f"the conversation takes {tokens} tokens and an answer up to {self.max_new_tokens}, but the language "
                f"model reads {longest}; start another conversation or ask for shorter answers."
            )

    @torch.inference_mode()
    def _encode(self, drawn: tuple[tuple[float, ...], ...]) -> None:
        """Run the tower once, on the picture with boxes `drawn` into it; keep the image tokens and what later boxes are
        read from."""
        inner, config, self._drawn = self.model.model, self.model.config, drawn
        image = draw_boxes(self._image, Boxes(list(drawn))) if drawn else self._image
        inputs = self.processor.picture_inputs([self.processor.pixels(image)], [image.size])
        layer = config.vision_feature_layer
        layers = {*([layer] if isinstance(layer, int) else layer), *inner.vision_tower.region_feature_layers}
        encoded = inner.get_image_features(
            **model_inputs(self.model, inputs), output_hidden_states=sorted(layers), return_dict=True
        )
        assert encoded.pooler_output is not None
        self._image_rows = list(encoded.pooler_output)
        patch = describe_tower(config.vision).patch_size
        height, width = inputs["pixel_values"].shape[-2:]
        self.features = TowerFeatures.from_output(encoded, (height, width), patch)

    def _empty_prefix(self) -> _Prefix:
        ids = torch.zeros(1, 0, dtype=torch.long, device=self.model.device)
        return _Prefix("", ids, DynamicCache(config=self.model.config.text))

    def _tokenise(self, text: str, regions: Boxes, fresh: bool) -> torch.Tensor:
        """Ids of what is new in the conversation; only its beginning has the picture's placeholder."""
        if fresh:
            written = self.processor.write(text, self.frame, regions)
        else:
            written = self.processor.write_regions(text, self.frame, regions)
        special = fresh and adds_special_tokens(self.processor.tokenizer, written)
        ids = self.processor.tokenizer(written, return_tensors="pt", add_special_tokens=special)["input_ids"]
        return ids.to(self.model.device)

    @torch.inference_mode()
    def _encoded(self, regions: Boxes, with_image: bool) -> dict[str, BaseModelOutputWithPooling]:
        encoded = {}
        if with_image:
            encoded["image"] = encoded_rows(self._image_rows)
        if len(regions) and self.processor.embeds_regions:
            boxes = self.processor.to_input(regions, self.frame)[None].to(self.model.device)
            rows = self.model.model.encode_more_regions(self.features, boxes)
            encoded["region"] = encoded_rows([rows])
        return encoded

    def _ends(self) -> list[int]:
        """What the model ends with, and whatever else ends an answer: text behind it would be shown and be no part."""
        own = self.model.generation_config.eos_token_id
        own = [own] if isinstance(own, int) else own or []
        return sorted(end_ids(self.processor) | set(own))

    def _generate(self, ids: torch.Tensor, encoded: dict, answer_ids: list[int]) -> Iterator[str]:
        cache = self._prefix.cache
        before = cache.get_seq_length()
        streamer = TextIteratorStreamer(self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        stop, result = _Stop(), {}

        def run() -> None:
            try:
                with torch.inference_mode():
                    result["output"] = self.model.generate(  # pyright: ignore[reportAttributeAccessIssue] - typed for other classes
                        input_ids=ids,
                        attention_mask=torch.ones_like(ids),
                        past_key_values=cache,
                        mm_encoder_outputs=encoded,
                        max_new_tokens=self.max_new_tokens,
                        eos_token_id=self._ends(),
                        streamer=streamer,
                        stopping_criteria=StoppingCriteriaList([stop]),
                        return_dict_in_generate=True,
                        output_logits=True,
                    )
            except Exception as error:  # raised again in the caller's thread
                result["error"] = error
            finally:
                streamer.end()

        worker = Thread(target=run, daemon=True)
        worker.start()
        finished = False
        try:
            yield from streamer
            worker.join()
            if "error" in result:
                raise result["error"]
            finished = True
        finally:
            stop.event.set()
            worker.join()
            if not finished:
                if "output" in result and before:  # stopped between two tokens
                    cache.crop(before - cache.get_seq_length())
                else:  # nothing to keep, or an error left the cache half written: begin with the conversation's text
                    self._prefix = self._empty_prefix()
        output = result["output"]
        answer_ids += output.sequences[0, ids.shape[1] :].tolist()
        steps = zip(output.logits, answer_ids, strict=True)
        probabilities = [float(step[0].float().softmax(-1)[token]) for step, token in steps]
        self.last_answer = decode_answer(self.processor, answer_ids, probabilities, self.frame)
        # The end token, and whatever came after it, is written by the chat template in the next turn.
        end = ids.shape[1] + len(text_ids(self.processor, answer_ids))
        if (surplus := cache.get_seq_length() - end) > 0:
            cache.crop(-surplus)


class _Stop(StoppingCriteria):
    """Ends generation at the next token once `event` is set."""

    def __init__(self):
        self.event = Event()

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self.event.is_set(), device=input_ids.device)
