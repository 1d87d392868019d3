"""A page of labelled images, to look at."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from ...vision_towers.errors import UserError
from ..bad_records import BadRecord
from ..record_io import load_record_image, read_records
from ..records import Record, Region
from ..scenes.glyphs import load_font
from ..scenes.page import BOX_COLORS
from ..webdataset import read_shard
from .run import LABELS
from .shard import FORMATS

CELL_PX = 420
LINE_PX = 14
FONT_PX = 11
LINES = 14  # of text under an image
MASK_OPACITY = 0.4


def preview_page(source: str | Path, out: str | Path, count: int = 12, columns: int = 3) -> int:
    """Draw the first `count` records of a label run's folder, a shard, or a file of region records as a PNG; returns
    how many are drawn.

    Boxes and masks have the colour of their line of text: number, score, and category, phrase, caption, transcript or
    cluster.
    Raises UserError when there is nothing to draw, or an image is gone.
    """
    found = list(islice(_labelled(Path(source)), count))
    if not found:
        raise UserError(f"{source}: there is no labelled image to draw.")
    cell = CELL_PX + LINES * LINE_PX
    page = Image.new("RGB", (min(columns, len(found)) * CELL_PX, -(-len(found) // columns) * cell), "white")
    for number, (record, image) in enumerate(found):
        page.paste(_drawn(record, image), (number % columns * CELL_PX, number // columns * cell))
    part = Path(out).with_name(f".{Path(out).name}.part")
    page.save(part, "PNG")
    part.replace(out)
    return len(found)


def _labelled(source: Path) -> Iterator[tuple[Record, Image.Image]]:
    for path in _shards(source):
        if path.suffix == ".tar":
            for item in read_shard(path):
                if not isinstance(item, BadRecord):
                    yield item[0], load_record_image(path.parent, item[0], data=item[1])
        else:
            records = read_records(path)
            yield from ((record, load_record_image(records.root, record)) for record in records.records)


def _shards(source: Path) -> Sequence[Path]:
    if source.is_file():
        return [source]
    if not (source / LABELS).is_file():
        raise UserError(f"{source}: neither a shard nor the folder of a label run (there is no {LABELS}).")
    return sorted(path for form in FORMATS.values() for path in source.glob(f"[0-9]*.{form}"))


def _drawn(record: Record, image: Image.Image) -> Image.Image:
    cell = Image.new("RGB", (CELL_PX, CELL_PX + LINES * LINE_PX), "white")
    scale = min((CELL_PX - 4) / record.width, (CELL_PX - 4) / record.height)
    size = max(1, round(record.width * scale)), max(1, round(record.height * scale))
    small = _with_masks(record, image.resize(size))
    draw = ImageDraw.Draw(small)
    font = load_font("DejaVuSans.ttf", FONT_PX)
    for number, region in enumerate(record.regions):
        color = BOX_COLORS[number % len(BOX_COLORS)]
        box = [edge * scale for edge in region.box_xyxy]
        draw.rectangle(box, outline=color, width=2)
        draw.text((box[0] + 3, box[1] + 1), str(number), fill=color, font=font, stroke_width=2, stroke_fill="white")
    cell.paste(small)
    writer = ImageDraw.Draw(cell)
    for row, (text, color) in enumerate(_lines(record)[:LINES]):
        writer.text((4, size[1] + 3 + row * LINE_PX), text, fill=color, font=font)
    return cell


def _with_masks(record: Record, image: Image.Image) -> Image.Image:
    pixels = np.asarray(image, dtype=np.float32)
    for number, region in enumerate(record.regions):
        if region.mask is not None:
            color = Image.new("RGB", (1, 1), BOX_COLORS[number % len(BOX_COLORS)]).getpixel((0, 0))
            mask = Image.fromarray(region.mask.to_array()).resize(image.size, Image.Resampling.NEAREST)
            weight = MASK_OPACITY * np.asarray(mask, dtype=np.float32)[..., None]
            pixels = pixels * (1 - weight) + np.array(color, dtype=np.float32) * weight
    return Image.fromarray(pixels.round().astype(np.uint8))


def _lines(record: Record) -> list[tuple[str, str]]:
    """(text, colour): what is said of the image, then a line for each region."""
    said = [*record.captions[:1], *(["tags: " + ", ".join(record.tags)] if record.tags else [])]
    lines = [(part, "black") for text in said for part in textwrap.wrap(text, CELL_PX // 6)[:3]]
    for number, region in enumerate(record.regions):
        text = f"{number}  {_score(region)}{_said(region)}"
        lines.append((textwrap.shorten(text, CELL_PX // 6, placeholder="…"), BOX_COLORS[number % len(BOX_COLORS)]))
    return lines


def _score(region: Region) -> str:
    return "" if region.score is None else f"{region.score:.2f}  "


def _said(region: Region) -> str:
    parts = [region.category, *region.texts[:1], *region.captions[:1]]
    parts += [f"“{region.ocr}”" if region.ocr else None]
    parts += [None if region.cluster is None else f"cluster {region.cluster}"]
    return " · ".join(dict.fromkeys(part for part in parts if part)) or "(no text)"
