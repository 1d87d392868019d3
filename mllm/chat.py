"""A conversation about one picture: the tower runs once, the KV prefix is kept, the likeliest tokens stream."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from PIL import Image
from transformers import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ..vision_towers import TowerFeatures, UserError, describe_tower
from .answers import Answer, decode_answer, end_ids, model_inputs
from .bos import adds_special_tokens
from .boxes import Boxes
from .draw import OVERLAY_COLORS, draw_boxes
from .greedy import greedy_tokens, is_settled
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
        self.last_answer_ids = answer_ids
        answer_text = self.processor.tokenizer.decode(answer_ids)
        self._messages += [question, assistant_message(answer_text)]
        self._boxes += new
        self._prefix.text = prompt + answer_text
        self._prefix.ids = torch.cat([ids, ids.new_tensor([answer_ids])], dim=1)

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

    def _ends(self) -> set[int]:
        """What the model ends with, and whatever else ends an answer: text behind it would be shown and be no part."""
        own = self.model.generation_config.eos_token_id
        return end_ids(self.processor) | {*([own] if isinstance(own, int) else own or [])}

    def _generate(self, ids: torch.Tensor, encoded: dict, answer_ids: list[int]) -> Iterator[str]:
        """Stream the answer to the conversation `ids`; its tokens go to `answer_ids`, and it to `last_answer`."""
        cache, tokenizer = self._prefix.cache, self.processor.tokenizer
        before = cache.get_seq_length()
        tokens = greedy_tokens(
            self.model, ids[:, before:], cache, encoded, ends=self._ends(), max_new_tokens=self.max_new_tokens
        )
        probabilities: list[float] = []
        shown = 0
        try:
            for token, probability in tokens:
                answer_ids.append(token)
                probabilities.append(probability)
                text = tokenizer.decode(answer_ids)
                if len(text) > shown and is_settled(tokenizer, answer_ids, text):
                    yield text[shown:]
                    shown = len(text)
            if len(rest := tokenizer.decode(answer_ids)) > shown:
                yield rest[shown:]
        except GeneratorExit:  # stopped between two tokens
            if before:
                cache.crop(before - cache.get_seq_length())
            else:
                self._prefix = self._empty_prefix()
            raise
        except Exception:  # the cache may be half written: the next turn begins with the conversation's text
            self._prefix = self._empty_prefix()
            raise
        self.last_answer = decode_answer(self.processor, answer_ids, probabilities, self.frame)
