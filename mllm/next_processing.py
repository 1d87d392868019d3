"""Pictures, questions and boxes in original pixels -> the tensors RegionLlavaNext takes; answers -> boxes again."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import pad

from ..vision_towers import UserError
from .boxes import Boxes, ImageFrame
from .processing import RegionLlavaProcessor, RegionPrompt
from .tiles import Pinpoints, stack_in_views, tiled_tokens, view_frames


class RegionLlavaNextProcessor(RegionLlavaProcessor):
    """As `RegionLlavaProcessor`, for a model that sees the whole picture and tiles of it.

    Pixels are made by LLaVA-NeXT's own image processor, to the bit. Boxes in text lie in the frame of the whole picture
    squeezed into a square; a box that takes an embedding is read from the view that shows it largest (`tiles`).

    Args:
        image_processor: a `LlavaNextImageProcessor`; holds the pinpoints.
        tokenizer: holds `<image>` and `<region>` as single tokens.
        patch_size: of the tower, pixels.
        image_size: side of a view, pixels.
        box_format, region_prompt: as of `RegionLlavaProcessor`.
    """

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        patch_size: int = 14,
        image_size: int = 336,
        box_format: str = "int1000",
        region_prompt: RegionPrompt = "tokens+coords",
        chat_template=None,
        **kwargs,
    ):
        super().__init__(
            image_processor,
            tokenizer,
            patch_size=patch_size,
            image_size=image_size,
            box_format=box_format,
            region_prompt=region_prompt,
            chat_template=chat_template,
        )

    @property
    def pinpoints(self) -> Pinpoints:
        """`(height, width)` of the canvases that tiles are cut from."""
        return self.image_processor.image_grid_pinpoints

    @property
    def letterboxed(self) -> bool:
        return False

    def frame(self, size: tuple[int, int]) -> ImageFrame:
        """The map between an original of `size = (width, height)` pixels and the view of the whole."""
        return ImageFrame.resize(size, (self.image_size, self.image_size))

    def fit(self, image: Image.Image) -> tuple[Image.Image, ImageFrame]:
        """The view of the whole picture, and its frame."""
        frame = self.frame(image.size)
        return image.convert("RGB").resize(frame.input_size, Image.Resampling.BICUBIC), frame

    def views(self, size: tuple[int, int]) -> list[ImageFrame | None]:
        """The frame of every view; None for a tile of nothing but padding."""
        return view_frames(size, self.pinpoints, self.image_size)

    def image_tokens(self, frame: ImageFrame) -> int:
        return tiled_tokens(frame.original_size, self.pinpoints, self.image_size, self.patch_size)

    def pixels(self, image: Image.Image) -> np.ndarray:
        """The views of the picture before normalisation: uint8 `(views, 3, side, side)`.

        Raises:
            UserError: the image processor makes other views than the boxes are mapped to.
        """
        made = self.image_processor([image.convert("RGB")], do_rescale=False, do_normalize=False, return_tensors="pt")
        views = made["pixel_values"][0]
        wanted = (len(self.views(image.size)), 3, self.image_size, self.image_size)
        if tuple(views.shape) != wanted:
            raise UserError(
                f"the image processor makes views {tuple(views.shape)} of a {image.width} x {image.height} picture and "
                f"{wanted} are expected; its size, crop_size and image_grid_pinpoints must fit image_size "
                f"{self.image_size}."
            )
        return views.to(torch.uint8).numpy()

    def picture_inputs(self, pixels: Sequence[np.ndarray], sizes: Sequence[tuple[int, int]]) -> dict[str, torch.Tensor]:
        """What the model takes of a batch of pictures: `pixel_values (B, V_max, 3, side, side)`, with zeros for views
        that a picture has not, and `image_sizes (B, 2)`, height and width of the originals.

        Args as of `RegionLlavaProcessor.picture_inputs`.
        """
        most = max(len(views) for views in pixels)
        normalised = [self.normalise(views) for views in pixels]
        padded = [pad(views, (0, 0, 0, 0, 0, 0, 0, most - len(views))) for views in normalised]
        heights_first = [(height, width) for width, height in sizes]
        return {"pixel_values": torch.stack(padded), "image_sizes": torch.tensor(heights_first)}

    def normalise(self, pixels: np.ndarray | torch.Tensor) -> torch.Tensor:
        """uint8 `(N, 3, side, side)` -> float32, as the image processor does it."""
        used = self.image_processor
        tensor = torch.as_tensor(np.array(pixels) if isinstance(pixels, np.ndarray) else pixels)
        return used.rescale_and_normalize(
            tensor, True, used.rescale_factor, True, tuple(used.image_mean), tuple(used.image_std)
        )

    def to_input(self, regions: Boxes, frame: ImageFrame) -> torch.Tensor:
        """Boxes of the original picture as float32 `(R, 4)` in pixels of its views stacked from top to bottom.

        Raises:
            UserError: a box outside the picture.
        """
        inside = self.inside(regions, frame)
        return stack_in_views(inside, self.views(frame.original_size), self.image_size).tensor()
