"""One object as pixels: a glyph or a word sign, scaled and rotated, ready to be pasted."""

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from .glyphs import COLORS, CONTRAST, Rgb, glyph_layers, load_font

COLOR_JITTER = 10  # levels by which each channel of a colour may differ between objects


IntBox = tuple[int, int, int, int]


def tight_box(mask: np.ndarray) -> IntBox:
    """The smallest xyxy box with continuous edges (last index + 1) around a bool mask (h, w) that is not empty."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


@dataclass(frozen=True)
class ObjectSpec:
    """What an object is, before it has a place.

    side: longer side of a glyph (before rotation), or width of a sign's plate, in pixels. angle: degrees,
    counter-clockwise. word and font: signs only.
    """

    category: str
    color: str
    side: float
    angle: float
    word: str | None = None
    font: str = ""


@dataclass(frozen=True)
class Sprite:
    """body and ink: L images of one size (255 = painted), cut to the body; `mask` is the body as bool (h, w)."""

    body: Image.Image
    ink: Image.Image
    body_color: Rgb
    ink_color: Rgb
    mask: np.ndarray

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels."""
        return self.body.size

    def paste_on(self, image: Image.Image, left: int, top: int) -> None:
        """Paint the sprite on `image` with its upper left corner at (left, top)."""
        image.paste(self.body_color, (left, top), self.body)
        image.paste(self.ink_color, (left, top), self.ink)


def draw_sprite(rng: np.random.Generator, spec: ObjectSpec) -> Sprite:
    """Draw the object; the result is a little larger than `spec.side` when it is rotated."""
    jitter = rng.integers(-COLOR_JITTER, COLOR_JITTER + 1, 3)
    color: Rgb = tuple(int(v) for v in np.clip(np.add(COLORS[spec.color], jitter), 0, 255))  # type: ignore[assignment]
    contrast = CONTRAST[spec.color]
    if spec.word is None:
        body, ink = glyph_layers(spec.category)
        scale = spec.side / max(body.size)
        size = (max(1, round(body.width * scale)), max(1, round(body.height * scale)))
        body, ink = (layer.resize(size, Image.Resampling.BILINEAR, reducing_gap=1.5) for layer in (body, ink))
        return _sprite(body, ink, contrast, color, spec.angle)
    body, ink = _plate(spec.word, spec.font, round(spec.side))
    return _sprite(body, ink, color, contrast, spec.angle)


def _plate(word: str, font: str, width: int) -> tuple[Image.Image, Image.Image]:
    """A plate `width` pixels wide with a rim and the word on it: (plate, rim and letters), L images."""
    inner = width * 0.86
    probe = load_font(font, 100).getbbox(word)
    px = max(8, int(100 * inner / (probe[2] - probe[0])))
    # A short word would make a plate that is higher than wide, so its letters stop growing here.
    px = min(px, int(width * 0.5))
    height = round(px * 1.25)
    rim = max(1, round(height * 0.05))
    body = Image.new("L", (width, height), 255)
    ink = Image.new("L", (width, height), 0)
    draw = ImageDraw.Draw(ink)
    draw.rectangle((0, 0, width - 1, height - 1), outline=255, width=rim)
    draw.text((width / 2, height * 0.48), word, fill=255, font=load_font(font, px), anchor="mm")
    return body, ink


def _sprite(body: Image.Image, ink: Image.Image, body_color: Rgb, ink_color: Rgb, angle: float) -> Sprite:
    """Rotate both layers and cut them to the painted body."""
    if angle:
        body = body.rotate(angle, Image.Resampling.BILINEAR, expand=True)
        ink = ink.rotate(angle, Image.Resampling.BILINEAR, expand=True)
    mask = np.asarray(body) >= 128
    box = tight_box(mask)
    return Sprite(body.crop(box), ink.crop(box), body_color, ink_color, mask[box[1] : box[3], box[0] : box[2]])
