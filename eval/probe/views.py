"""What of an image a tower gets to see in a probe: at what size, and padded or stretched."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from PIL import Image

from ...mllm.boxes import ImageFrame
from ...mllm.boxes.frame import content_size
from ...train_stages.images import ImageError
from ...train_stages.pixels import Fill, PixelCache
from ...train_stages.record_io import BadRecord, RecordSet, load_record_image, refuse_too_many_bad
from ...vision_towers import TowerSpec, UserError


def checked_side(side: int | None, spec: TowerSpec) -> int:
    """`side` in pixels, the tower's own when None.

    Raises UserError when the tower cannot take it: another size than its own has to be a multiple of the patch, and the
    tower one of any resolution.
    """
    side = side or spec.image_size
    if side != spec.image_size and (side % spec.patch_size or not spec.any_resolution):
        raise UserError(
            f"this tower cannot take {side} px: its patches have {spec.patch_size} px, and its own size is "
            f"{spec.image_size} px."
        )
    return side


def stretched(records: RecordSet, side: int) -> PixelCache:
    """Whole images, each stretched to `side` x `side` pixels, without padding. Bad images as in `PixelCache.build`."""

    def view(image: Image.Image) -> tuple[Image.Image, ImageFrame]:
        seen = image.resize((side, side), Image.Resampling.BICUBIC)
        return seen, ImageFrame.resize(image.size, (side, side))

    return _seen(records, side, view)


def cornered(records: RecordSet, side: int, fill: Fill) -> PixelCache:
    """Whole images whose longest side has `side` pixels, in the upper left corner of a square; the rest of it is
    `fill`. Bad images as in `PixelCache.build`."""

    def view(image: Image.Image) -> tuple[Image.Image, ImageFrame]:
        square = Image.new("RGB", (side, side), fill)
        square.paste(image.resize(content_size(image.size, side), Image.Resampling.BICUBIC))
        return square, replace(ImageFrame.letterbox(image.size, side), offset=(0.0, 0.0))

    return _seen(records, side, view)


def _seen(records: RecordSet, side: int, view: Callable[[Image.Image], tuple[Image.Image, ImageFrame]]) -> PixelCache:
    pixels = np.empty((len(records), 3, side, side), dtype=np.uint8)
    frames: list[ImageFrame] = []
    good, bad = [], []
    for record in records.records:
        try:
            image = load_record_image(records.root, record)
        except ImageError as error:
            bad.append(BadRecord(record.image, str(error)))
            refuse_too_many_bad(records.path, bad, len(records))
            continue
        square, frame = view(image.convert("RGB"))
        pixels[len(good)] = np.asarray(square).transpose(2, 0, 1)
        frames.append(frame)
        good.append(record)
    if not good:
        raise UserError(f"{records.path}: no image of it can be read ({bad[0].reason if bad else 'it is empty'}).")
    return PixelCache(pixels[: len(good)], frames, good, bad)
