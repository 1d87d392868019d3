"""Pictures of segments: the image, the truth and the answer, side by side."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from ...train_stages.pixels import PixelCache
from .label_maps import VOID, PanopticMap

SIDE = 288  # pixels of each picture in the sheet
GAP = 6
SHOWN = 0.4  # how much of the image shines through a segment
LEAST = 0.004  # share of the picture from which a segment gets its name


def segment_sheet(
    cache: PixelCache,
    rows: Sequence[int],
    truths: Sequence[PanopticMap],
    answers: Sequence[PanopticMap],
    names: Sequence[str],
) -> Image.Image:
    """A line for each of `rows` of `cache`: the image, its true segments, and those of the answer; the last two in
    pixels of the original. Void is dark."""
    sheet = Image.new("RGB", (3 * (SIDE + GAP) - GAP, len(rows) * (SIDE + GAP) - GAP), "white")
    for line, (row, *maps) in enumerate(zip(rows, truths, answers, strict=True)):
        view = Image.fromarray(np.array(cache.pixels[row]).transpose(1, 2, 0)).resize((SIDE, SIDE))
        seen = [given.seen(cache.frames[row], (SIDE, SIDE)) for given in maps]
        for place, picture in enumerate([view, *(painted(view, given, names) for given in seen)]):
            sheet.paste(picture, (place * (SIDE + GAP), line * (SIDE + GAP)))
    return sheet


def painted(image: Image.Image, segments: PanopticMap, names: Sequence[str]) -> Image.Image:
    """Each segment in the colour of its class, with a white rim and its name."""
    pixels = np.asarray(image, dtype=float)
    colours = np.array([*(_colour(label) for label in segments.classes), (0.0, 0.0, 0.0)])
    mixed = SHOWN * pixels + (1 - SHOWN) * 255 * colours[segments.segment]
    mixed[_rims(segments.segment)] = 255
    picture = Image.fromarray(mixed.astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    for number, label in enumerate(segments.classes):
        ys, xs = (segments.segment == number).nonzero()
        if len(ys) >= LEAST * segments.segment.size:
            middle = np.argmin((ys - ys.mean()) ** 2 + (xs - xs.mean()) ** 2)  # inside, whatever the shape
            where = (float(xs[middle]), float(ys[middle]))
            draw.text(where, names[label], "white", anchor="mm", font_size=12, stroke_width=2, stroke_fill="black")
    return picture


def _rims(segment: np.ndarray) -> np.ndarray:
    """Pixels of a segment whose right or lower neighbour is of another."""
    rims = np.zeros(segment.shape, dtype=bool)
    rims[:-1] |= segment[:-1] != segment[1:]
    rims[:, :-1] |= segment[:, :-1] != segment[:, 1:]
    return rims & (segment != VOID)


def _colour(label: int) -> tuple[float, float, float]:
    """Far from those of its neighbours: steps of the golden angle around the circle of hues."""
    return colorsys.hsv_to_rgb(label * 0.618 % 1, 0.55 + 0.4 * (label % 2), 0.95)
