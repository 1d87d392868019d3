"""The views that LLaVA-NeXT has of a picture: the whole squeezed into a square, and tiles of a larger one.

The geometry is that of transformers' image processor and of its `pack_image_features`; the pixels are made there.
"""

from collections.abc import Sequence

import numpy as np
import torch
from transformers.image_processing_utils import get_patch_output_size, select_best_resolution
from transformers.image_utils import ChannelDimension

from .boxes import Boxes, ImageFrame

Size = tuple[int, int]
Pinpoints = Sequence[Sequence[int]]

ROUNDING = 1e-3  # original pixels: a picture's edge seen through a tile is not exactly that edge


def view_frames(size: Size, pinpoints: Pinpoints, side: int) -> list[ImageFrame | None]:
    """The frame of each view: the whole picture first, then the tiles row by row; None for a tile of nothing but
    padding.

    Args:
        size: width and height of the picture. pinpoints: `(height, width)` of the canvases that tiles are cut from,
            multiples of `side`. side: pixels of a view.
    """
    width, height = size
    canvas_h, canvas_w = select_best_resolution((height, width), list(pinpoints))
    blank = torch.empty(3, height, width, device="meta")  # only its shape is looked at
    content_h, content_w = get_patch_output_size(blank, (canvas_h, canvas_w), ChannelDimension.FIRST)
    left, top = (canvas_w - content_w) // 2, (canvas_h - content_h) // 2
    content = ImageFrame.resize(size, (content_w, content_h))
    frames: list[ImageFrame | None] = [ImageFrame.resize(size, (side, side))]
    for y in range(-top, canvas_h - top, side):
        for x in range(-left, canvas_w - left, side):
            shows = x < content_w and x + side > 0 and y < content_h and y + side > 0
            cut = (float(x), float(y), float(x + side), float(y + side))
            tile = ImageFrame.crop((content_w, content_h), cut, (side, side)) if shows else None
            frames.append(content.then(tile) if tile is not None else None)
    return frames


def tiled_tokens(size: Size, pinpoints: Pinpoints, side: int, patch: int) -> int:
    """Image tokens of a picture: those of the whole view, and the tiles' without the padding, each row closed by one
    more (`image_newline`)."""
    width, height = size
    canvas = select_best_resolution((height, width), list(pinpoints))
    cells = side // patch
    rows, columns = (edge // side * cells for edge in canvas)
    # As LLaVA-NeXT's `unpad_image`, which cuts as much from both ends.
    if width / height > columns / rows:
        rows -= (rows - int(round(height * (columns / width), 7))) // 2 * 2
    else:
        columns -= (columns - int(round(width * (rows / height), 7))) // 2 * 2
    return cells * cells + rows * (columns + 1)


def stack_in_views(boxes: Boxes, frames: Sequence[ImageFrame | None], side: int) -> Boxes:
    """Boxes inside the picture -> pixels of its views stacked from top to bottom, a canvas of `side` times
    `len(frames) * side` pixels.

    A box is read from the tile that holds all of it, when it is larger there than in the view of the whole; else from
    the whole. Not in a paper: LLaVA-NeXT knows no boxes.
    """
    assert frames[0] is not None  # shows everything
    best = frames[0].to_input(boxes)[0].xyxy.copy()
    areas = _areas(best)
    for number, frame in enumerate(frames[1:], start=1):
        if frame is None:
            continue
        shown, kept = frame.visible_part(boxes)
        there = frame.to_input(boxes)[0].xyxy
        whole = np.abs(shown.xyxy - boxes.xyxy[kept]).max(axis=1, initial=0.0) < ROUNDING
        better = whole & (_areas(there) > areas[kept])
        best[kept[better]] = there[better] + (0.0, number * side, 0.0, number * side)
        areas[kept[better]] = _areas(there[better])
    return Boxes(best)


def views_of_rows(boxes: torch.Tensor, side: int) -> torch.Tensor:
    """The view that each row of stacked boxes `(..., 4)` lies in: whole numbers `(...)`. A box ends where its view
    does."""
    return (torch.ceil(boxes[..., 3] / side).long() - 1).clamp(min=0)


def _areas(xyxy: np.ndarray) -> np.ndarray:
    return (xyxy[:, 2] - xyxy[:, 0]) * (xyxy[:, 3] - xyxy[:, 1])
