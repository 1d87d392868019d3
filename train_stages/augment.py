"""Random views for pre-training, with the boxes kept true. The paper states no augmentation; this one is ours.

There is no mirror image: it would turn text, and "left", into something false.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..mllm.boxes import Boxes, ImageFrame
from ..vision_towers.errors import UserError

MIN_VISIBLE = 0.5  # a region with less of its area in view is dropped: its label may no longer be visible
ZOOM_MIN = 1.05  # a window around a region is at least this much longer than the region

Window = tuple[int, int, int]  # left, top, side


@dataclass(frozen=True)
class AugmentConfig:
    """How far a random view may go; `AugmentConfig(1, 0, 0)` leaves the image as it is.

    min_scale: smallest side of the random square crop, as a share of the image's side; 1 = no crop.
    brightness, contrast: largest relative change; 0 = none. Hue is left alone, colours may be part of a label.
    zoom: share of the views that are drawn around a random region instead. A tower that starts from nothing learns
        shapes many times faster when they are large.
    zoom_max: longest side of such a window, in units of the region's longer side.
    """

    min_scale: float = 0.8
    brightness: float = 0.15
    contrast: float = 0.15
    zoom: float = 0.0
    zoom_max: float = 2.5

    def __post_init__(self) -> None:
        if not 0.0 < self.min_scale <= 1.0:
            raise UserError(f"min_scale is {self.min_scale}, it must be in (0, 1]")
        for name in ("brightness", "contrast"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise UserError(f"{name} is {getattr(self, name)}, it must be in [0, 1)")
        if not 0.0 <= self.zoom <= 1.0:
            raise UserError(f"zoom is {self.zoom}, it must be in [0, 1]")
        if self.zoom_max < ZOOM_MIN:
            raise UserError(f"zoom_max is {self.zoom_max}, it must be at least {ZOOM_MIN}")


class View(NamedTuple):
    """pixels: uint8 (3, side, side). boxes: those still at least half visible, in pixels of the view; kept: their
    `(K,)` indices. frame: the image's pixels -> the view's."""

    pixels: Tensor
    boxes: Boxes
    kept: np.ndarray
    frame: ImageFrame


def random_view(
    pixels: Tensor, boxes: Boxes, config: AugmentConfig, rng: np.random.Generator, side: int | None = None
) -> View:
    """One random view of an image.

    pixels: uint8 (3, S, S). boxes: xyxy in its pixels. side: of the view, pixels; S when absent.
    A view that would lose every box is given up: the whole image takes its place.
    """
    size = pixels.shape[-1]
    around = len(boxes) > 0 and rng.uniform() < config.zoom
    window = _zoomed(size, boxes, config.zoom_max, rng) if around else _cropped(size, config.min_scale, rng)
    view = side or size
    frame = _frame(window, size, view)
    shown, kept = _seen(boxes, frame)
    if len(boxes) and not len(kept):
        window = (0, 0, size)
        frame = _frame(window, size, view)
        shown, kept = _seen(boxes, frame)
    return View(_jitter(cut_square(pixels, window, view), config, rng), shown, kept, frame)


def square_around(box: np.ndarray, longest: float, size: int) -> Window:
    """The square window of side `longest` (pixels, rounded up, at most `size`) around the middle of a box, moved inside
    the `size` x `size` image."""
    side = min(size, int(np.ceil(longest)))
    left, top = (int(np.clip(round((box[i] + box[i + 2] - side) / 2), 0, size - side)) for i in (0, 1))
    return left, top, side


def cut_square(pixels: Tensor, window: Window, side: int) -> Tensor:
    """A window of uint8 (3, S, S), resized to uint8 (3, side, side)."""
    left, top, length = window
    if length == side:
        return pixels[:, top : top + side, left : left + side]
    # On bytes, torch's kernel is four times faster than on floats.
    cut = pixels[None, :, top : top + length, left : left + length]
    return F.interpolate(cut, size=(side, side), mode="bilinear", antialias=True)[0]


def _zoomed(size: int, boxes: Boxes, zoom_max: float, rng: np.random.Generator) -> Window:
    """A window that holds a random region whole (when it fits), at a random place."""
    x1, y1, x2, y2 = boxes.xyxy[rng.integers(len(boxes))]
    side = min(size, int(np.ceil(max(x2 - x1, y2 - y1) * rng.uniform(ZOOM_MIN, max(ZOOM_MIN, zoom_max)))))

    def start(low: float, high: float) -> int:
        first, last = max(0.0, high - side), min(low, float(size - side))
        return int(np.clip(round(rng.uniform(min(first, last), max(first, last))), 0, size - side))

    return start(x1, x2), start(y1, y2), side


def _cropped(size: int, min_scale: float, rng: np.random.Generator) -> Window:
    side = round(size * rng.uniform(min_scale, 1.0))
    left, top = rng.integers(0, size - side + 1, size=2).tolist()
    return left, top, side


def _frame(window: Window, size: int, view: int) -> ImageFrame:
    left, top, length = window
    return ImageFrame.crop((size, size), (left, top, left + length, top + length), (view, view))


def _seen(boxes: Boxes, frame: ImageFrame) -> tuple[Boxes, np.ndarray]:
    """The boxes of which at least `MIN_VISIBLE` lies in the view, cut to it, in pixels of the view, their indices."""
    if frame == ImageFrame.identity(frame.original_size):
        return boxes, np.arange(len(boxes))
    cut, kept = frame.to_input(boxes)
    enough = cut.area >= MIN_VISIBLE * frame.scale[0] ** 2 * boxes.area[kept]
    return cut[enough], kept[enough]


def _jitter(pixels: Tensor, config: AugmentConfig, rng: np.random.Generator) -> Tensor:
    if not config.brightness and not config.contrast:
        return pixels
    brightness, contrast = rng.uniform(-1, 1, size=2) * (config.brightness, config.contrast)
    values = pixels.float() * (1 + brightness)
    mean = values.mean()
    return ((values - mean) * (1 + contrast) + mean).round_().clamp_(0, 255).to(torch.uint8)
