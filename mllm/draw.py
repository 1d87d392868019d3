"""Boxes on a picture: for the `overlay` region prompt, for answers, and for report pages."""

from collections.abc import Sequence

from PIL import Image, ImageDraw

from .boxes import Boxes

OVERLAY_COLORS = ("red", "blue", "lime", "yellow", "magenta", "cyan")


def draw_boxes(
    image: Image.Image,
    boxes: Boxes,
    colors: Sequence[str] = OVERLAY_COLORS,
    labels: Sequence[str] | None = None,
) -> Image.Image:
    """A copy of the picture with each box outlined in its own colour, and labelled when labels are given.

    Args:
        image: RGB.
        boxes: xyxy in pixels of this picture.
        colors: cycled through.
        labels: one a box, written at its top left corner.
    """
    picture = image.convert("RGB").copy()
    draw = ImageDraw.Draw(picture)
    line = max(2, round(max(picture.size) / 200))
    for index, (x1, y1, x2, y2) in enumerate(boxes):
        color = colors[index % len(colors)]
        # PIL's outline covers the pixels x1..x2 inclusive; our edges are continuous.
        draw.rectangle((x1, y1, max(x1, x2 - 1), max(y1, y2 - 1)), outline=color, width=line)
        if labels:
            size = max(10, round(max(picture.size) / 28))
            left, top, right, bottom = draw.textbbox((x1 + line, y1 + line), labels[index], font_size=size)
            draw.rectangle((left - 1, top - 1, right + 1, bottom + 1), fill=color)
            draw.text(
                (x1 + line, y1 + line),
                labels[index],
                fill="white" if color in ("red", "blue") else "black",
                font_size=size,
            )
    return picture
