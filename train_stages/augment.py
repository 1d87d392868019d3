"""Small random views for pre-training, with the boxes kept true. The paper states no augmentation; this one is ours.

There is no mirror image: it would turn text, and "left", into something false.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..mllm.boxes import Boxes, ImageFrame
from ..vision_towers.errors import UserError

MIN_VISIBLE = 0.5  # a region with less of its area in view is dropped: its label may no longer be visible


@dataclass(frozen=True)
class AugmentConfig:
    """How far a random view may go; `AugmentConfig(1, 0, 0)` leaves the image as it is.

    min_scale: smallest side of the random square crop, as a share of the image's side; 1 = no crop.
    brightness, contrast: largest relative change; 0 = none. Hue is left alone, colours may be part of a label.
    """

    min_scale: float = 0.8
    brightness: float = 0.15
    contrast: float = 0.15

    def __post_init__(self) -> None:
        if not 0.0 < self.min_scale <= 1.0:
            raise UserError(f"min_scale is {self.min_scale}, it must be in (0, 1]")
        for name in ("brightness", "contrast"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise UserError(f"{name} is {getattr(self, name)}, it must be in [0, 1)")


def random_view(
    pixels: Tensor, boxes: Boxes, config: AugmentConfig, rng: np.random.Generator
) -> tuple[Tensor, Boxes, np.ndarray]:
    """One random view of an image.

    pixels: uint8 (3, S, S). boxes: xyxy in its pixels.
    Returns uint8 (3, S, S), the boxes that are still at least half visible in pixels of the view, and their `(K,)`
    indices. A view that would lose every box is given up: the crop is left out.
    """
    pixels, boxes, kept = _crop(pixels, boxes, config.min_scale, rng)
    return _jitter(pixels, config, rng), boxes, kept


def _crop(pixels: Tensor, boxes: Boxes, min_scale: float, rng: np.random.Generator):
    everything = np.arange(len(boxes))
    size = pixels.shape[-1]
    side = round(size * rng.uniform(min_scale, 1.0))
    left, top = rng.integers(0, size - side + 1, size=2).tolist()
    if side == size:
        return pixels, boxes, everything
    frame = ImageFrame.crop((size, size), (left, top, left + side, top + side), (size, size))
    cut, kept = frame.to_input(boxes)
    shown = cut.area / (frame.scale[0] * frame.scale[1])
    enough = shown >= MIN_VISIBLE * boxes.area[kept]
    if len(boxes) and not enough.any():
        return pixels, boxes, everything
    window = pixels[None, :, top : top + side, left : left + side].float()
    window = F.interpolate(window, size=(size, size), mode="bilinear", antialias=True)[0]
    return window.round_().clamp_(0, 255).to(torch.uint8), cut[enough], kept[enough]


def _jitter(pixels: Tensor, config: AugmentConfig, rng: np.random.Generator) -> Tensor:
    brightness, contrast = rng.uniform(-1, 1, size=2) * (config.brightness, config.contrast)
    if not config.brightness and not config.contrast:
        return pixels
    values = pixels.float() * (1 + brightness)
    mean = values.mean()
    return ((values - mean) * (1 + contrast) + mean).round_().clamp_(0, 255).to(torch.uint8)
