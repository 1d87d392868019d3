"""A contact sheet of scenes, to look at: boxes, a phrase for each, and the phrases that are true of nothing."""

import textwrap
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from .generate import Scene
from .glyphs import load_font

CELL_PX = 460  # room for the largest picture of a scene
LINE_PX = 15
FONT_PX = 12
BOX_COLORS = ("#ff00c8", "#00b7ff", "#ff7b00", "#00c853", "#a040ff", "#e0b000", "#ff4040", "#008c8c")


def scene_page(scenes: Sequence[Scene], columns: int = 3) -> Image.Image:
    """Draw the scenes on one sheet. Each region's box and one of its phrases have one colour; a phrase that is true of
    several regions is marked with their number, points are small circles, and absent phrases stand last."""
    font = load_font("DejaVuSans.ttf", FONT_PX)
    height = CELL_PX + LINE_PX * 14
    rows = -(-len(scenes) // columns)
    page = Image.new("RGB", (columns * CELL_PX, rows * height), "white")
    draw = ImageDraw.Draw(page)
    for number, scene in enumerate(scenes):
        left, top = number % columns * CELL_PX, number // columns * height
        page.paste(_with_boxes(scene), (left, top))
        lines = _lines(scene, np.random.default_rng(number))
        for i, (text, color) in enumerate(lines):
            draw.text((left + 4, top + scene.image.height + 4 + i * LINE_PX), text, fill=color, font=font)
    return page


def _with_boxes(scene: Scene) -> Image.Image:
    """A copy of the scene's picture with boxes and points."""
    image = scene.image.copy()
    draw = ImageDraw.Draw(image)
    for i, region in enumerate(scene.record.regions):
        x0, y0, x1, y1 = region.box_xyxy
        # The line runs just outside the box, whose edges are those of its outermost pixels.
        draw.rectangle((x0 - 1, y0 - 1, x1, y1), outline=BOX_COLORS[i % len(BOX_COLORS)])
    for point in scene.record.points:
        x, y = point.xy
        draw.ellipse((x - 3, y - 3, x + 3, y + 3), outline="black", fill="white")
    return image


def _lines(scene: Scene, rng: np.random.Generator) -> list[tuple[str, str]]:
    """(text, colour) of the lines under a scene."""
    lines = []
    regions = scene.record.regions
    for i, region in enumerate(regions):
        text = region.texts[rng.integers(len(region.texts))] if region.texts else f"[{region.category}]"
        shared = sum(text in other.texts for other in regions)
        lines.append((text + (f" ({shared} referents)" if shared > 1 else ""), BOX_COLORS[i % len(BOX_COLORS)]))
    lines.append(("absent: " + ", ".join(scene.record.absent), "gray"))
    lines += [(caption, "black") for caption in scene.record.captions[:1]]
    return [(part, color) for text, color in lines for part in textwrap.wrap(text, CELL_PX // 7)]
