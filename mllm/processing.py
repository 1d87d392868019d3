"""Pictures, questions and boxes in original pixels -> the tensors RegionLlava takes; answers -> boxes again."""

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature, ProcessorMixin

from ..vision_towers import UserError, pad_boxes
from .bos import adds_special_tokens
from .boxes import Boxes, ImageFrame, ParsedBoxes, Points, box_format, letterbox_image, mean_colour
from .draw import OVERLAY_COLORS, draw_boxes
from .projectors import image_token_count
from .prompts import IMAGE_TOKEN, REGION_TOKEN

RegionPrompt = Literal["tokens", "coords", "tokens+coords", "overlay"]
BoxesLike = Boxes | Sequence[Sequence[float]]


class RegionLlavaProcessor(ProcessorMixin):
    """Tokenizer, image normalisation, the input frame and the box convention of one model.

    Args:
        image_processor: rescales and normalises only; resizing is done here, where the frame is known.
        tokenizer: holds `<image>` and `<region>` as single tokens.
        patch_size: of the tower, pixels.
        image_size: side of the square letterboxed input; with `row_end` the longest side of an input that keeps its
            aspect ratio.
        merge_size: patches a side that become one image token (2 with the merging projector).
        row_end: a token closes each row of image tokens; images then keep their aspect ratio.
        num_prefix_tokens: prefix tokens that stay among the image tokens (LLaVA's "full" strategy keeps CLS).
        box_format: the one convention the model reads and writes, a name of `boxes.BOX_FORMATS`.
        region_prompt: what `<region>` in a question becomes: an embedding (`tokens`), coordinates (`coords`), both
            (`tokens+coords`), or a box drawn into the image (`overlay`).
    """

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        patch_size: int = 14,
        image_size: int = 336,
        merge_size: int = 1,
        row_end: bool = False,
        num_prefix_tokens: int = 0,
        box_format: str = "int1000",
        region_prompt: RegionPrompt = "tokens+coords",
        chat_template=None,
        **kwargs,
    ):
        if region_prompt not in get_args(RegionPrompt):
            raise UserError(f"region_prompt must be one of {', '.join(get_args(RegionPrompt))}, got {region_prompt!r}.")
        self.patch_size, self.image_size, self.merge_size = patch_size, image_size, merge_size
        self.row_end, self.num_prefix_tokens = row_end, num_prefix_tokens
        self.box_format, self.region_prompt = box_format, region_prompt
        self.image_token, self.region_token = IMAGE_TOKEN, REGION_TOKEN
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    @property
    def image_token_id(self) -> int:
        return self.tokenizer.convert_tokens_to_ids(self.image_token)

    @property
    def region_token_id(self) -> int:
        return self.tokenizer.convert_tokens_to_ids(self.region_token)

    def frame(self, size: tuple[int, int]) -> ImageFrame:
        """The map between an original of `size = (width, height)` pixels and the model input."""
        if not self.row_end:
            return ImageFrame.letterbox(size, self.image_size)
        step = self.patch_size * self.merge_size
        scale = min(1.0, self.image_size / max(size))
        width, height = (max(step, round(side * scale / step) * step) for side in size)
        return ImageFrame.resize(size, (width, height))

    def fit(self, image: Image.Image) -> tuple[Image.Image, ImageFrame]:
        """The picture as the model sees it, before normalisation, and its frame."""
        image = image.convert("RGB")
        if not self.row_end:
            return letterbox_image(image, self.image_size, self.fill_colour)
        frame = self.frame(image.size)
        return image.resize(frame.input_size, Image.Resampling.BICUBIC), frame

    @property
    def fill_colour(self) -> tuple[int, int, int]:
        """The letterbox bars: the normalisation's mean colour, zero to the tower."""
        return mean_colour(self.image_processor.image_mean)

    @property
    def letterboxed(self) -> bool:
        """Whether the model sees one square of `image_size`, the picture letterboxed: such pixels can be kept."""
        return not self.row_end

    def image_tokens(self, frame: ImageFrame) -> int:
        """How many `<image>` tokens an input takes."""
        width, height = frame.input_size
        grid = (height // self.patch_size, width // self.patch_size)
        return image_token_count(grid, self.merge_size, self.row_end) + self.num_prefix_tokens

    def __call__(
        self,
        images: Image.Image | Sequence[Image.Image] | None = None,
        text: str | Sequence[str] | None = None,
        boxes: Sequence[BoxesLike] | None = None,
        points: Sequence[Points | Sequence[Sequence[float]]] | None = None,
        **tokenizer_kwargs,
    ) -> BatchFeature:
        """Prepare a batch of prompts.

        Args:
            images: one picture a prompt, upright RGB (see `train_stages.images.open_image`), or none at all.
            text: prompts, each with one `<image>` when images are given, and one `<region>` a box.
            boxes: for each prompt its boxes, xyxy in pixels of the original picture.
            points: for each prompt its points; a point is a 5 px box around it and comes after the prompt's boxes.
            tokenizer_kwargs: handed to the tokenizer (`padding`, ...). Tensors are returned.
        Returns:
            `input_ids`, `attention_mask`, and with images `pixel_values (B, 3, H, W)`, and with region embeddings
            `boxes (B, R_max, 4)` float32 in input pixels and `region_counts (B,)`.
        Raises:
            UserError: counts of prompts, pictures, placeholders and boxes that do not agree, or a box outside its
                picture.
        """
        texts = [text] if isinstance(text, str) else list(text or [])
        pictures = [images] if isinstance(images, Image.Image) else list(images or [])
        regions = self._regions(len(texts), boxes, points)
        if not pictures:
            return self._text_only(texts, regions, tokenizer_kwargs)
        if len(pictures) != len(texts):
            raise UserError(f"{len(texts)} prompts need as many pictures, got {len(pictures)}.")

        if self.region_prompt == "overlay":
            pictures = [draw_boxes(p, r, OVERLAY_COLORS) for p, r in zip(pictures, regions, strict=True)]
        sizes = [picture.size for picture in pictures]
        data = self.picture_inputs([self.pixels(picture) for picture in pictures], sizes)
        frames = [self.frame(size) for size in sizes]
        prompts = [self.write(t, f, r) for t, f, r in zip(texts, frames, regions, strict=True)]
        data = self._tokenise(prompts, tokenizer_kwargs) | data
        if self.embeds_regions and any(len(rows) for rows in regions):
            inputs = [self.to_input(rows, frame) for rows, frame in zip(regions, frames, strict=True)]
            data["boxes"], data["region_counts"] = pad_boxes(inputs)
        return BatchFeature(data)

    def write(self, text: str, frame: ImageFrame, regions: Boxes) -> str:
        """A prompt with every placeholder replaced: `<image>` repeated, `<region>` as `region_prompt` says."""
        if text.count(self.image_token) != 1:
            found = text.count(self.image_token)
            raise UserError(f"a prompt about a picture holds {self.image_token} once, this one {found} times: {text!r}")
        written = self.write_regions(text, frame, regions)
        return written.replace(self.image_token, self.image_token * self.image_tokens(frame))

    def write_regions(self, text: str, frame: ImageFrame, regions: Boxes) -> str:
        """The text with each `<region>` replaced as `region_prompt` says; there is one a box."""
        self._check_placeholders(text, regions)
        pieces = text.split(self.region_token)
        prompts = [self._region_prompt(regions, index, frame) for index in range(len(regions))]
        return pieces[0] + "".join(prompt + piece for prompt, piece in zip(prompts, pieces[1:], strict=True))

    def pixels(self, image: Image.Image) -> np.ndarray:
        """The picture as the model sees it, before normalisation: uint8 `(3, H, W)`."""
        return np.asarray(self.fit(image)[0]).transpose(2, 0, 1)

    def picture_inputs(self, pixels: Sequence[np.ndarray], sizes: Sequence[tuple[int, int]]) -> dict[str, torch.Tensor]:
        """What the model takes of a batch of pictures: `pixel_values (B, 3, H, W)`.

        Args:
            pixels: of each picture, as `pixels` gives them. sizes: width and height of each original.
        Raises:
            UserError: inputs of several sizes.
        """
        if len({array.shape for array in pixels}) > 1:
            raise UserError("one batch takes pictures of one input size; group pictures by processor.frame(size).")
        return {"pixel_values": self.normalise(np.stack(pixels))}

    def normalise(self, pixels: np.ndarray | torch.Tensor) -> torch.Tensor:
        """uint8 `(B, 3, H, W)` in the input frame -> float32, scaled to 0..1, mean and std of the tower."""
        tensor = torch.as_tensor(np.array(pixels) if isinstance(pixels, np.ndarray) else pixels).float() / 255
        mean = torch.tensor(self.image_processor.image_mean).view(3, 1, 1)
        std = torch.tensor(self.image_processor.image_std).view(3, 1, 1)
        return (tensor - mean) / std

    def parse_boxes(self, answer: str, frame: ImageFrame) -> ParsedBoxes:
        """The boxes in an answer, in pixels of the original picture, by the model's one convention."""
        return box_format(self.box_format).parse(answer, frame)

    def _regions(self, count: int, boxes, points) -> list[Boxes]:
        for name, given in (("boxes", boxes), ("points", points)):
            if given is not None and len(given) != count:
                raise UserError(f"{name} holds {len(given)} lists for {count} prompts; give one list a prompt.")
        regions = []
        for index in range(count):
            rows = boxes[index] if boxes is not None else ()
            merged = rows.xyxy if isinstance(rows, Boxes) else np.asarray(list(rows), dtype=float).reshape(-1, 4)
            if points is not None:
                dots = points[index]
                dots = dots if isinstance(dots, Points) else Points(dots)
                merged = np.concatenate([merged, dots.to_boxes().xyxy])
            regions.append(Boxes(merged))
        return regions

    def _check_placeholders(self, text: str, regions: Boxes) -> None:
        found = text.count(self.region_token)
        if found != len(regions):
            raise UserError(
                f"the prompt holds {found} {self.region_token} placeholders and comes with {len(regions)} boxes; "
                f"give one box a placeholder: {text!r}"
            )

    def _region_prompt(self, regions: Boxes, index: int, frame: ImageFrame) -> str:
        coords = box_format(self.box_format).write(regions[index : index + 1], frame)
        return {
            "tokens": self.region_token,
            "coords": coords,
            "tokens+coords": f"{self.region_token} {coords}",
            "overlay": f"the {OVERLAY_COLORS[index % len(OVERLAY_COLORS)]} box",
        }[self.region_prompt]

    @property
    def embeds_regions(self) -> bool:
        """Whether `<region>` takes an embedding, so that the model needs the boxes."""
        return "tokens" in self.region_prompt

    def to_input(self, regions: Boxes, frame: ImageFrame) -> torch.Tensor:
        """Boxes of the original picture as float32 `(R, 4)` in input pixels.

        Raises:
            UserError: a box outside the picture.
        """
        return frame.to_input(self.inside(regions, frame))[0].tensor()

    def inside(self, regions: Boxes, frame: ImageFrame) -> Boxes:
        """The boxes cut to the picture, in its pixels.

        Raises:
            UserError: a box outside the picture.
        """
        parts, kept = frame.visible_part(regions)
        if len(kept) != len(regions):
            lost = next(i for i in range(len(regions)) if i not in set(kept.tolist()))
            width, height = frame.original_size
            raise UserError(f"box {tuple(regions[lost])} lies outside the {width} x {height} picture.")
        return parts

    def _text_only(self, texts: list[str], regions: list[Boxes], tokenizer_kwargs: dict) -> BatchFeature:
        for text, rows in zip(texts, regions, strict=True):
            if self.image_token in text or len(rows):
                raise UserError(f"the prompt speaks of a picture and none was given: {text!r}")
            self._check_placeholders(text, rows)
        return BatchFeature(self._tokenise(texts, tokenizer_kwargs))

    def _tokenise(self, texts: list[str], options: dict) -> dict:
        special = {"add_special_tokens": all(adds_special_tokens(self.tokenizer, text) for text in texts)}
        return dict(self.tokenizer(texts, return_tensors="pt", **(special | options)))
