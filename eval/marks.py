"""Region prompts drawn into a picture, for models that take no boxes: an outline, a dot, or a tinted shape."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image, ImageColor, ImageDraw

from ..mllm.boxes import Boxes
from ..mllm.draw import OVERLAY_COLORS, draw_boxes

_DOT_SHARE = 0.012  # radius of a dot, of the picture's longer side


@dataclass(frozen=True)
class Mark:
    """What stands for a region: its box in pixels of the picture, around the point or shape where it is one."""

    kind: Literal["box", "point", "shape"]
    box_xyxy: tuple[float, ...]


def mark_names(marks: Sequence[Mark]) -> list[str]:
    """What a question calls each mark: "the red box", "the blue dot", ..."""
    noun = {"box": "box", "point": "dot", "shape": "area"}
    return [f"the {OVERLAY_COLORS[i % len(OVERLAY_COLORS)]} {noun[mark.kind]}" for i, mark in enumerate(marks)]


def draw_marks(image: Image.Image, marks: Sequence[Mark], shape: np.ndarray | None = None) -> Image.Image:
    """A copy of the picture with the marks in it.

    Args:
        image: RGB.
        marks: each takes the next colour of `OVERLAY_COLORS`.
        shape: `(height, width)` bool, of a mark of that kind; tinted half through.
    """
    picture = image.convert("RGB").copy()
    for index, mark in enumerate(marks):
        color = OVERLAY_COLORS[index % len(OVERLAY_COLORS)]
        if mark.kind == "box":
            picture = draw_boxes(picture, Boxes([mark.box_xyxy]), [color])
        elif mark.kind == "point":
            x, y = (mark.box_xyxy[0] + mark.box_xyxy[2]) / 2, (mark.box_xyxy[1] + mark.box_xyxy[3]) / 2
            radius = max(3.0, _DOT_SHARE * max(picture.size))
            ImageDraw.Draw(picture).ellipse((x - radius, y - radius, x + radius, y + radius), fill=color)
        elif shape is not None:
            pixels = np.asarray(picture).copy()
            pixels[shape] = (pixels[shape].astype(int) + np.array(ImageColor.getrgb(color))) // 2
            picture = Image.fromarray(pixels)
    return picture
