"""What of an image a tower gets to see in a probe: at what size, and padded or stretched."""

from __future__ import annotations

import numpy as np
from PIL import Image

from ...mllm.boxes import ImageFrame
from ...train_stages.images import ImageError
from ...train_stages.pixels import PixelCache
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
    pixels = np.empty((len(records), 3, side, side), dtype=np.uint8)
    good, bad = [], []
    for record in records.records:
        try:
            image = load_record_image(records.root, record)
        except ImageError as error:
            bad.append(BadRecord(record.image, str(error)))
            refuse_too_many_bad(records.path, bad, len(records))
            continue
        pixels[len(good)] = np.asarray(image.resize((side, side), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
        good.append(record)
    if not good:
        raise UserError(f"{records.path}: no image of it can be read ({bad[0].reason if bad else 'it is empty'}).")
    frames = [ImageFrame.resize((record.width, record.height), (side, side)) for record in good]
    return PixelCache(pixels[: len(good)], frames, good, bad)
