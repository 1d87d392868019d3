"""What stands in a scene: glyph categories, colours and the fonts of signs.

All drawings come from the DejaVu fonts that matplotlib ships. A glyph is drawn as *ink* in its colour over a *body* in
a contrasting colour: the body is the ink grown by a thin rim with every hole filled, so that thin line drawings stay
visible over any photograph and a mask is one solid silhouette.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .package_files import package_file

BASE_PX = 208  # longer side of a cached drawing: no scene needs a larger one
RIM_PX = 6  # width of the contrasting rim at that size
SIGN = "sign"  # the category of a word on a plate

Rgb = tuple[int, int, int]
WHITE: Rgb = (255, 255, 255)
BLACK: Rgb = (12, 12, 12)

COLORS: dict[str, Rgb] = {
    "red": (222, 28, 36),
    "yellow": (252, 212, 0),
    "green": (16, 150, 52),
    "blue": (24, 84, 232),
    "purple": (154, 44, 196),
    "white": (248, 248, 248),
}
CONTRAST: dict[str, Rgb] = {
    "red": WHITE,
    "yellow": BLACK,
    "green": WHITE,
    "blue": WHITE,
    "purple": WHITE,
    "white": BLACK,
}


@dataclass(frozen=True)
class Glyph:
    """One category: its character, its plural, and how to turn the drawing into ink.

    `filled` paints the inside of an outline drawing in the object's colour; `stroke` thickens thin lines (pixels at
    `BASE_PX`); `main_part` keeps the largest connected part alone (the snowman without the falling snow).
    """

    char: str
    plural: str
    filled: bool = False
    stroke: int = 0
    main_part: bool = False


GLYPHS: dict[str, Glyph] = {
    "star": Glyph("★", "stars"),
    "heart": Glyph("♥", "hearts"),
    "spade": Glyph("♠", "spades"),
    "club": Glyph("♣", "clubs"),
    "diamond": Glyph("♦", "diamonds"),
    "triangle": Glyph("▲", "triangles"),
    "arrow": Glyph("➡", "arrows"),
    "cross": Glyph("✖", "crosses"),
    "check mark": Glyph("✔", "check marks"),
    "sun": Glyph("☀", "suns"),
    "cloud": Glyph("☁", "clouds"),
    "moon": Glyph("☾", "moons", filled=True),
    "lightning bolt": Glyph("⚡", "lightning bolts", filled=True, stroke=3),
    "snowflake": Glyph("❄", "snowflakes", stroke=2),
    "flower": Glyph("✿", "flowers"),
    "umbrella": Glyph("☂", "umbrellas"),
    "snowman": Glyph("☃", "snowmen", stroke=2, main_part=True),
    "cup": Glyph("☕", "cups", stroke=2),
    "house": Glyph("⌂", "houses", filled=True),
    "flag": Glyph("⚑", "flags"),
    "phone": Glyph("☎", "phones"),
    "envelope": Glyph("✉", "envelopes", stroke=2),
    "pencil": Glyph("✏", "pencils", stroke=1),
    "scissors": Glyph("✂", "scissors", stroke=1),
    "airplane": Glyph("✈", "airplanes"),
    "anchor": Glyph("⚓", "anchors"),
    "gear": Glyph("⚙", "gears"),
    "scales": Glyph("⚖", "scales", stroke=2),
    "hand": Glyph("☛", "hands"),
    "skull": Glyph("☠", "skulls", stroke=1),
    "smiley": Glyph("☻", "smileys"),
    "cat": Glyph("\U0001f431", "cats", stroke=2),
    "monkey": Glyph("\U0001f435", "monkeys", stroke=1),
    "queen": Glyph("♛", "queens"),
    "rook": Glyph("♜", "rooks"),
    "knight": Glyph("♞", "knights"),
    "pawn": Glyph("♟", "pawns"),
    "music note": Glyph("♫", "music notes"),
    "atom": Glyph("⚛", "atoms", stroke=2),
    "peace symbol": Glyph("☮", "peace symbols", stroke=1),
    "recycling symbol": Glyph("♻", "recycling symbols"),
    "radiation symbol": Glyph("☢", "radiation symbols"),
    "yin yang": Glyph("☯", "yin yangs"),
}
CATEGORIES: tuple[str, ...] = tuple(GLYPHS)

GLYPH_FONT = "DejaVuSans.ttf"
SIGN_FONTS: tuple[str, ...] = (
    "DejaVuSans.ttf",
    "DejaVuSans-Bold.ttf",
    "DejaVuSans-Oblique.ttf",
    "DejaVuSans-BoldOblique.ttf",
    "DejaVuSerif.ttf",
    "DejaVuSerif-Bold.ttf",
    "DejaVuSerif-Italic.ttf",
    "DejaVuSansMono-Bold.ttf",
)


def plural(category: str) -> str:
    """The plural of a category of scenes ("star" -> "stars", "sign" -> "signs")."""
    return "signs" if category == SIGN else GLYPHS[category].plural


@lru_cache(maxsize=512)
def load_font(name: str, px: int) -> ImageFont.FreeTypeFont:
    """A font that matplotlib ships, by file name, at `px` pixels an em."""
    return ImageFont.truetype(package_file("matplotlib", f"mpl-data/fonts/ttf/{name}"), px)


@lru_cache(maxsize=len(GLYPHS))
def glyph_layers(category: str) -> tuple[Image.Image, Image.Image]:
    """(body, ink) of a category as two L images of one size, longer side `BASE_PX`; 255 = painted."""
    from scipy import ndimage

    glyph = GLYPHS[category]
    margin = RIM_PX + glyph.stroke
    drawing = _drawing(glyph.char, BASE_PX - 2 * margin)
    ink = np.pad(np.asarray(drawing), margin)
    if glyph.main_part:
        parts = np.zeros(ink.shape, np.int32)
        ndimage.label(ink > 127, output=parts)
        largest = np.bincount(parts.ravel())[1:].argmax() + 1
        ink = np.where(np.asarray(ndimage.binary_fill_holes(parts == largest)), ink, 0).astype(np.uint8)
    if glyph.filled:
        ink = _fill_holes(ink)
    if glyph.stroke:
        ink = np.maximum(ink, _grow(ink, glyph.stroke))
    body = _fill_holes(_grow(ink, RIM_PX))
    left, top, right, bottom = Image.fromarray(body).getbbox() or (0, 0, 1, 1)
    body, ink = body[top:bottom, left:right], ink[top:bottom, left:right]
    return Image.fromarray(np.ascontiguousarray(body)), Image.fromarray(np.ascontiguousarray(ink))


def _drawing(char: str, longer_side: int) -> Image.Image:
    """The character, cut to its ink and scaled to `longer_side` pixels."""
    canvas = Image.new("L", (400, 400))
    ImageDraw.Draw(canvas).text((200, 200), char, fill=255, font=load_font(GLYPH_FONT, 220), anchor="mm")
    box = canvas.getbbox() or (0, 0, 1, 1)
    width, height = box[2] - box[0], box[3] - box[1]
    scale = longer_side / max(width, height)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return canvas.crop(box).resize(size, Image.Resampling.LANCZOS)


def _fill_holes(layer: np.ndarray) -> np.ndarray:
    """A layer (uint8) with every enclosed hole painted."""
    from scipy import ndimage

    return np.where(np.asarray(ndimage.binary_fill_holes(layer > 127)), 255, layer).astype(np.uint8)


def _grow(ink: np.ndarray, radius: int) -> np.ndarray:
    """Ink (uint8) grown by `radius` pixels, with a soft edge of one pixel."""
    from scipy import ndimage

    distance = np.asarray(ndimage.distance_transform_edt(ink < 128))
    return (np.clip(radius + 0.5 - distance, 0.0, 1.0) * 255).astype(np.uint8)
