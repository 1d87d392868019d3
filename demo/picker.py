"""Where pictures come from on the page: a file that is chosen, dropped or pasted, the webcam, and examples.

A part of our own on `gr.HTML`: `gr.Image` replaces its file input whenever it has read a file, and what is chosen in
that moment, or while the server still opens the picture before, is lost.
"""

from __future__ import annotations

from collections.abc import Sequence

import gradio as gr

from .examples import Example
from .limits import Limits
from .pictures import data_url
from .stage import FOLDER

THUMBNAIL = 200  # pixels, the longer side

# What the page runs when the event of a choice is over, well or not.
PICTURE_OVER = '() => { document.dispatchEvent(new CustomEvent("rt-picture-over")); return []; }'


def picture_picker(elem_id: str, examples: Sequence[Example], limits: Limits) -> gr.HTML:
    """Its event is `upload`; its value the choice: `{"name", "size", "path"}` of a file (no path: it did not arrive, or
    is too large to be sent), or `{"example": index}`."""
    return gr.HTML(
        {},
        examples=[{"title": example.title, "picture": _thumbnail(example)} for example in examples],
        most_bytes=limits.file_bytes,
        html_template=(FOLDER / "picker.html").read_text(encoding="utf-8"),
        css_template=(FOLDER / "picker.css").read_text(encoding="utf-8"),
        js_on_load=(FOLDER / "picker.js").read_text(encoding="utf-8"),
        apply_default_css=False,
        elem_id=elem_id,
    )


def _thumbnail(example: Example) -> str:
    small = example.image.copy()
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    return data_url(small)
