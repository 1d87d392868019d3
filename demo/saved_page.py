"""A conversation as one HTML file: no script, nothing loaded from anywhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from PIL import Image

from .answer_html import conversation_html, outlines
from .conversation import Turn
from .pictures import data_url

_STYLE = """
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif; }
body { max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
section { display: grid; grid-template-columns: repeat(auto-fit, minmax(18rem, 1fr)); gap: 1rem; margin: 1.5rem 0; }
svg { width: 100%; height: auto; border-radius: 6px; }
.rt-question { font-weight: 600; }
.rt-remark { font-size: .8em; opacity: .7; }
.rt-chip, .rt-box, .rt-words { border-radius: 4px; padding: 0 .25em; background: #8883; }
.rt-words { border-bottom: 2px solid #14a35a; }
.rt-score { font-size: .8em; opacity: .8; }
"""


def saved_page(image: Image.Image, conversations: Mapping[str, Sequence[Turn]]) -> str:
    """The page: the picture, and beside each turn the picture with its regions and boxes drawn.

    Args:
        conversations: turns by the name of the model; models that said nothing are left out.
    """
    width, height = image.size
    parts = []
    for name, turns in conversations.items():
        if not turns:
            continue
        parts.append(f"<h2>{escape(name)}</h2>")
        drawn = outlines(turns, "s")
        for turn in turns:
            shapes = "".join(_shape(row, max(width, height)) for row in drawn if row["turn"] == turn.number)
            picture = f'<svg viewBox="0 0 {width} {height}" role="img"><use href="#picture"/>{shapes}</svg>'
            parts.append(f"<section>{picture}<div>{conversation_html([turn], 's')}</div></section>")
    whole = f'<image id="picture" width="{width}" height="{height}" href="{data_url(image)}"/>'
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">"
        f"<title>A conversation about a picture</title><style>{_STYLE}</style></head><body>"
        "<h1>A conversation about a picture</h1>"
        f'<svg width="0" height="0" style="position:absolute"><defs>{whole}</defs></svg>'
        f"{''.join(parts) or '<p>Nothing was said.</p>'}</body></html>"
    )


def _shape(row: dict, longest: int) -> str:
    x1, y1, x2, y2 = row["box_xyxy"]
    colour = "#e5484d" if row["kind"] == "asked" else "#14a35a"
    line, size = max(1.5, longest / 220), max(9.0, longest / 32)
    return (
        f'<g data-box="{row["id"]}"><rect x="{x1:.2f}" y="{y1:.2f}" width="{x2 - x1:.2f}" height="{y2 - y1:.2f}" '
        f'fill="none" stroke="{colour}" stroke-width="{line:.2f}"/>'
        f'<text x="{x1 + line:.2f}" y="{max(size, y1 - line):.2f}" font-size="{size:.1f}" fill="{colour}" '
        f'stroke="#fff" stroke-width="{size / 5:.1f}" paint-order="stroke">{escape(row["text"])}</text></g>'
    )
