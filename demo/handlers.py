"""What happens when something on the page is used: values of its parts in, changes of its parts out.

A user's mistake becomes a sentence in the page's notice; a bug becomes a short sentence there and a traceback in the
server's log. Neither ends the page.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from ..vision_towers import UserError
from .answer_html import EMPTY, conversation_html, outlines
from .engine import Engine
from .examples import Example
from .marks import Mark
from .models import DemoModel
from .pictures import data_url
from .saved_page import saved_page
from .sessions import Session
from .stage import NOTHING_DRAWN

log = logging.getLogger(__name__)
BROKEN = "Something went wrong on the server; its log says what. The page goes on."
SLOTS = ("A", "B")  # of the conversations side by side


def notice_html(text: str, level: str = "error") -> str:
    """A message on the page; "" = none."""
    role = "alert" if level == "error" else "status"
    return f'<div class="rt-notice" data-level="{level}" role="{role}">{escape(text)}</div>' if text else ""


def problem(error: Exception) -> str:
    """The sentence for an exception; what is no user's mistake goes to the log."""
    if isinstance(error, UserError):
        return str(error)
    log.error("the demo failed", exc_info=error)
    return BROKEN


class Handlers:
    """Functions of the page's events; `None` among a result's updates means "as it was"."""

    def __init__(self, engine: Engine, examples: list[Example]):
        self.engine, self.examples = engine, examples

    def open_upload(self, upload: dict[str, Any] | None, token: str) -> list[Any]:
        """A picture was uploaded, pasted or photographed: the file as it came, inside the upload folder. Returns
        updates of what `_opened` updates."""
        if upload is None or not upload.get("path"):
            return [gr.skip()] * OPENED_PARTS
        path = Path(upload["path"])
        name = upload.get("orig_name") or path.name
        try:
            session, note = self.engine.open_bytes(path.read_bytes(), name)
        except Exception as error:
            return [None, *[gr.skip()] * (OPENED_PARTS - 2), notice_html(problem(error))]
        self.engine.sessions.close(token)
        return self._opened(session, (), "", note)

    def open_example(self, index: int, token: str) -> list[Any]:
        """An example was chosen. Returns updates of what `_opened` updates."""
        example = self.examples[index]
        try:
            session = self.engine.open_image(example.image)
        except Exception as error:
            return [gr.skip()] * (OPENED_PARTS - 1) + [notice_html(problem(error))]
        self.engine.sessions.close(token)
        return self._opened(session, example.marks, example.questions[0], "", example.questions)

    def ask(
        self,
        token: str,
        question: str,
        drawn: dict[str, Any] | None,
        model: str,
        other: str | None,
        region_prompt: str,
        max_new_tokens: float,
    ) -> Iterator[list[Any]]:
        """A question was sent. Yields updates of: both conversations, stage, question, send, stop, notice."""
        names = self._names(model, other)
        drawn = drawn or NOTHING_DRAWN
        text = notice_html("")
        yield [gr.skip(), gr.skip(), gr.skip(), gr.skip(), gr.Button(visible=False), gr.Button(visible=True), text]
        asked = False
        try:
            steps = self.engine.ask(
                token,
                names,
                question or "",
                drawn.get("marks"),
                selected=drawn.get("selected"),
                region_prompt=region_prompt,
                max_new_tokens=int(max_new_tokens),
            )
            for _ in steps:
                pages = self._pages(token, names)
                # The question leaves its box once it stands in the conversation.
                yield [*pages, gr.skip(), gr.skip() if asked else "", gr.skip(), gr.skip(), gr.skip()]
                asked = True
        except Exception as error:
            text = notice_html(problem(error))
        pages, shown = (self._pages(token, names), self._outlines(token, names)) if asked else ([gr.skip()] * 2, None)
        stage = gr.update(outlines=shown) if shown is not None else gr.skip()
        yield [*pages, stage, gr.skip(), gr.Button(visible=True), gr.Button(visible=False), text]

    def stop(self, token: str) -> None:
        """Stop was pressed."""
        try:
            self.engine.stop(token)
        except UserError:
            return  # nothing is being answered

    def restart(self, token: str) -> list[Any]:
        """New conversation about the same picture. Updates of: both conversations, stage, notice."""
        try:
            self.engine.restart(token)
        except Exception as error:
            return [gr.skip(), gr.skip(), gr.skip(), notice_html(problem(error))]
        return [EMPTY, EMPTY, gr.update(outlines={}), ""]

    def show(self, token: str, model: str, other: str | None) -> list[Any]:
        """Another model was chosen. Updates of: both conversations, their titles, stage."""
        names = self._names(model, other)
        titles = [gr.update(value=title_html(self.engine.sessions.model(name))) for name in names]
        second = gr.update(visible=len(names) > 1)
        try:
            pages, stage = self._pages(token, names), gr.update(outlines=self._outlines(token, names))
        except UserError:  # no picture yet
            pages, stage = [gr.skip()] * 2, gr.skip()
        return [*pages, *titles, *[gr.skip()] * (2 - len(titles)), second, stage]

    def similarity(self, token: str, drawn: dict[str, Any] | None, model: str, other: str | None) -> list[Any]:
        """Heat-maps of the selected mark. Updates of: the panel, notice."""
        drawn = drawn or NOTHING_DRAWN
        marks, number = drawn.get("marks"), drawn.get("selected")
        return self._panel(lambda name: self.engine.similarity(token, name, marks, number), model, other)

    def tokens(self, token: str, model: str, other: str | None) -> list[Any]:
        """Tokens as colours. Updates of: the panel, notice."""
        return self._panel(lambda name: self.engine.tokens(token, name), model, other)

    def save(self, token: str) -> list[Any]:
        """The conversation as a page. Updates of: the page's text, notice."""
        try:
            session = self.engine.sessions.get(token)
            turns = {name: conversation.turns for name, conversation in session.conversations.items()}
            return [saved_page(session.image, turns), ""]
        except Exception as error:
            return ["", notice_html(problem(error))]

    def _opened(
        self, session: Session, marks: tuple[Mark, ...], question: str, note: str, questions: tuple[str, ...] = ()
    ) -> list[Any]:
        width, height = session.image.size
        value = {
            "marks": [mark_row(mark) for mark in marks],
            "selected": marks[0].number if marks else None,
            "next": max((mark.number for mark in marks), default=0) + 1,
        }
        stage = gr.update(value=value, picture=data_url(session.image), width=width, height=height, outlines={})
        offers = gr.update(choices=list(questions), value=None, visible=bool(questions))
        remark = notice_html(note, "note")
        closed = gr.update(open=False)
        return [None, session.token, stage, EMPTY, EMPTY, question, offers, closed, "", "", remark]

    def _names(self, model: str, other: str | None) -> list[str]:
        """The models of the page's two menus; the second may name none, or the same again."""
        return [model, *([other] if other and other in self.engine.sessions.models and other != model else [])]

    def _pages(self, token: str, names: list[str]) -> list[Any]:
        session = self.engine.sessions.get(token)
        pages: list[Any] = [
            conversation_html(session.conversations[name].turns, slot) for name, slot in zip(names, SLOTS, strict=False)
        ]
        return [*pages, *[gr.skip()] * (2 - len(pages))]

    def _outlines(self, token: str, names: list[str]) -> dict[str, list[dict]]:
        session = self.engine.sessions.get(token)
        return {slot: outlines(session.conversations[n].turns, slot) for n, slot in zip(names, SLOTS, strict=False)}

    def _panel(self, draw: Callable[[str], Image.Image], model: str, other: str | None) -> list[Any]:
        names = self._names(model, other)
        try:
            return [f'<div class="rt-panel">{"".join(figure_html(draw(name), name) for name in names)}</div>', ""]
        except Exception as error:
            return [gr.skip(), notice_html(problem(error))]


OPENED_PARTS = 11  # what `_opened` updates


def mark_row(mark: Mark) -> dict[str, Any]:
    """A mark as the stage and the HTTP API write it."""
    place = {"point_xy": list(mark.point_xy)} if mark.point_xy else {"box_xyxy": list(mark.box_xyxy)}
    return {"number": mark.number, **place, "label": mark.label}


def figure_html(image: Image.Image, caption: str) -> str:
    """A picture with its caption, in the page itself."""
    name = escape(caption)
    return (
        f'<figure class="rt-figure"><img alt="{name}" src="{data_url(image)}"><figcaption>{name}</figcaption></figure>'
    )


def title_html(model: DemoModel) -> str:
    """The heading of a model's conversation: its name and what it is made of."""
    made = model.summary()
    size = f"{made['parameters'] / 1e6:.1f} M parameters"
    parts = f"{made['tower']} at {made['image_size']} px, {made['language_model']}, {size}"
    return f'<h3 class="rt-title">{escape(model.name)} <span>{escape(parts)}</span></h3>'
