"""The picture on the page: boxes and points drawn, moved, named and deleted by mouse, finger or keys; answers' boxes.

A part of our own on `gr.HTML`: of the annotation components for Gradio, the one that runs under Gradio 6
(`gradio_image_annotation`) knows no points and cannot link a box with a word of an answer. Functions, not subclasses:
for a subclass Gradio writes a `.pyi` file beside the source.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

FOLDER = Path(__file__).parent
NOTHING_DRAWN: dict[str, Any] = {"picture": "", "marks": [], "selected": None, "next": 1}


def picture_stage(elem_id: str) -> gr.HTML:
    """Its value is `{"picture": which one, "marks": [...], "selected": number or None, "next": number}`, marks as
    `read_marks` takes them.

    Props an event can change: `picture` (a data address, "" = none), `width` and `height` of the picture in its own
    pixels, and `outlines`, for each conversation (by its letter) what `answer_html.outlines` says.
    """
    return gr.HTML(
        NOTHING_DRAWN,
        picture="",
        width=1,
        height=1,
        outlines={},
        html_template=(FOLDER / "stage.html").read_text(encoding="utf-8"),
        css_template=(FOLDER / "stage.css").read_text(encoding="utf-8"),
        js_on_load=(FOLDER / "stage.js").read_text(encoding="utf-8"),
        apply_default_css=False,
        elem_id=elem_id,
    )
