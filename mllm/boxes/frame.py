"""The exact map between an original image and what the model sees of it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ...vision_towers.errors import UserError
from .boxes import Boxes

Size = tuple[int, int]


@dataclass(frozen=True)
class ImageFrame:
    """`input = original * scale + offset`, for x and y, and the part of the original that the input shows.

    Make one with `identity`, `resize`, `letterbox`, `crop` or `tiles`; chain two with `then`.

    Attributes:
        original_size: width, height of the original image in pixels, after EXIF transpose.
        input_size: width, height of the model input in pixels.
        scale: input pixels per original pixel, for x and y.
        offset: input position of the original's top left corner (negative when a crop cut it off).
        visible_xyxy: the part of the original, in original pixels, that lies inside the input.
    """

    original_size: Size
    input_size: Size
    scale: tuple[float, float]
    offset: tuple[float, float]
    visible_xyxy: tuple[float, float, float, float]

    @classmethod
    def identity(cls, size: Size) -> ImageFrame:
        """The input is the original."""
        return cls.resize(size, size)

    @classmethod
    def resize(cls, size: Size, input_size: Size) -> ImageFrame:
        """The whole original stretched to `input_size`; the aspect ratio may change."""
        size, input_size = _size(size), _size(input_size)
        return cls(size, input_size, _ratio(input_size, size), (0.0, 0.0), (0.0, 0.0, float(size[0]), float(size[1])))

    @classmethod
    def letterbox(cls, size: Size, side: int) -> ImageFrame:
        """The original scaled to fit a `side` x `side` square and centred in it; `letterbox_image` makes the pixels.

        The content is a whole number of pixels, `max(1, round(W * side / max(W, H)))` wide, so x and y scale may differ
        by a rounding.
        """
        size = _size(size)
        (side, _) = _size((side, side))
        content = content_size(size, side)
        offset = (float((side - content[0]) // 2), float((side - content[1]) // 2))
        return cls(size, (side, side), _ratio(content, size), offset, (0.0, 0.0, float(size[0]), float(size[1])))

    @classmethod
    def crop(cls, size: Size, crop_xyxy: tuple[float, float, float, float], input_size: Size) -> ImageFrame:
        """The part `crop_xyxy` of the original (original pixels) stretched to `input_size`.

        The crop may stick out of the image; `visible_xyxy` is then the part inside.

        Raises:
            UserError: a crop without area, or one that shows nothing of the image.
        """
        size, input_size = _size(size), _size(input_size)
        left, top, right, bottom = Boxes([crop_xyxy])[0]
        visible = (max(left, 0.0), max(top, 0.0), min(right, float(size[0])), min(bottom, float(size[1])))
        if visible[0] >= visible[2] or visible[1] >= visible[3]:
            raise UserError(f"the crop {(left, top, right, bottom)} shows nothing of the {size[0]} x {size[1]} image.")
        scale = (input_size[0] / (right - left), input_size[1] / (bottom - top))
        return cls(size, input_size, scale, (-left * scale[0], -top * scale[1]), visible)

    @classmethod
    def tiles(cls, size: Size, grid: tuple[int, int], side: int) -> list[ImageFrame]:
        """`cols * rows` equal parts of the original, row by row, each stretched to `side` x `side` pixels.

        That is a resize to `(cols * side, rows * side)`, then a cut (InternVL's tiles; no padding).
        """
        columns, rows = _size(grid)
        width, height = _size(size)
        xs = [width * column / columns for column in range(columns + 1)]
        ys = [height * row / rows for row in range(rows + 1)]
        return [
            cls.crop(size, (xs[column], ys[row], xs[column + 1], ys[row + 1]), (side, side))
            for row in range(rows)
            for column in range(columns)
        ]

    def then(self, second: ImageFrame) -> ImageFrame:
        """This frame followed by one whose original is this frame's input.

        CLIP's own preprocessing is `resize(size, short).then(crop(short, centre, (side, side)))`, where `short` is the
        size with its shortest edge at `side`.

        Raises:
            UserError: the sizes do not meet, or nothing of the original is left to see.
        """
        if second.original_size != self.input_size:
            raise UserError(
                f"a frame of a {second.original_size} image cannot follow one that makes {self.input_size}."
            )
        shown = self._unmap(np.array([second.visible_xyxy]))[0].tolist()
        mine = self.visible_xyxy
        visible = (max(mine[0], shown[0]), max(mine[1], shown[1]), min(mine[2], shown[2]), min(mine[3], shown[3]))
        if visible[0] >= visible[2] or visible[1] >= visible[3]:
            raise UserError("the second frame shows nothing of the original image, only padding.")
        scale = (self.scale[0] * second.scale[0], self.scale[1] * second.scale[1])
        offset = (
            self.offset[0] * second.scale[0] + second.offset[0],
            self.offset[1] * second.scale[1] + second.offset[1],
        )
        return ImageFrame(self.original_size, second.input_size, scale, offset, visible)

    def visible_part(self, boxes: Boxes) -> tuple[Boxes, np.ndarray]:
        """The boxes cut to the visible part, still in original pixels, and the `(K,)` indices of those that remain.

        A box that only touches the visible part is absent. One without area stays when it lies inside.
        """
        x1, y1, x2, y2 = self.visible_xyxy
        cut = np.concatenate([np.maximum(boxes.xyxy[:, :2], (x1, y1)), np.minimum(boxes.xyxy[:, 2:], (x2, y2))], axis=1)
        low, high = cut[:, :2], cut[:, 2:]
        flat = boxes.xyxy[:, :2] == boxes.xyxy[:, 2:]
        kept = np.flatnonzero(((high > low) | (flat & (high == low))).all(axis=1))
        return Boxes(cut[kept]), kept

    def to_input(self, boxes: Boxes) -> tuple[Boxes, np.ndarray]:
        """Original pixels -> input pixels.

        Args:
            boxes: `(N, 4)` in original pixels.

        Returns:
            The visible parts in input pixels, `(K, 4)`, and the `(K,)` int indices of the boxes that have one: a box
            that a crop cuts comes as its visible part, a box outside the crop (or the image) is absent.
        """
        parts, kept = self.visible_part(boxes)
        corners = parts.xyxy.reshape(-1, 2, 2) * self.scale + self.offset
        # Rounding can step over the input's edge by a hair; towers check that boxes lie inside.
        return Boxes(np.clip(corners, 0.0, self.input_size).reshape(-1, 4)), kept

    def to_original(self, boxes: Boxes) -> Boxes:
        """Input pixels -> original pixels, cut to the visible part; row `i` stays row `i`.

        A box that lies wholly in the padding becomes one without area at the nearest edge.
        """
        x1, y1, x2, y2 = self.visible_xyxy
        return Boxes(np.clip(self._unmap(boxes.xyxy), (x1, y1, x1, y1), (x2, y2, x2, y2)))

    def _unmap(self, xyxy: np.ndarray) -> np.ndarray:
        return ((xyxy.reshape(-1, 2, 2) - self.offset) / self.scale).reshape(-1, 4)


def content_size(size: Size, side: int) -> Size:
    """Width and height that the image takes inside a `side` x `side` letterbox."""
    scale = side / max(size)
    return (max(1, round(size[0] * scale)), max(1, round(size[1] * scale)))


def _ratio(to: Size, of: Size) -> tuple[float, float]:
    return (to[0] / of[0], to[1] / of[1])


def _size(size: Size) -> Size:
    """Width and height as positive ints, or a UserError."""
    width, height = size
    if int(width) != width or int(height) != height or width < 1 or height < 1:
        raise UserError(f"a size is (width, height) in whole positive numbers, got {size}.")
    return (int(width), int(height))
