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
from .uploads import check_size, short_name

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
    """Functions of the page's events."""

    def __init__(self, engine: Engine, examples: list[Example], uploads: Path):
        self.engine, self.examples, self.uploads = engine, examples, uploads.resolve()

    def open(self, choice: Any, token: str) -> list[Any]:
        """A picture was chosen (`picture_picker` says how). Returns updates of what `_opened` updates."""
        try:
            session, example, note = self._open(choice)
        except Exception as error:
            return [*[gr.skip()] * (OPENED_PARTS - 1), notice_html(problem(error))]
        self.engine.sessions.close(token)
        return self._opened(session, example, note)

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
        """A question was sent. Yields updates of: both conversations, stage, question, send, stop, both menus, notice.

        Another model's conversation cannot be chosen while one answers: what comes would stand under its name.
        """
        names = self._names(model, other)
        drawn = drawn or NOTHING_DRAWN
        text = notice_html("")
        menu, as_it_was = gr.update(interactive=False), [gr.skip()] * 4
        yield [*as_it_was, gr.update(visible=False), gr.update(visible=True), menu, menu, text]
        asked = False
        try:
            session = self._session(token, drawn)
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
                if token not in self.engine.sessions:
                    continue  # closing it has stopped the answer
                # The question leaves its box once it stands in the conversation.
                cleared = gr.skip() if asked else ""
                yield [*self._pages(session, names), gr.skip(), cleared, *as_it_was, gr.skip()]
                asked = True
        except Exception as error:
            text = notice_html(problem(error))
        if not asked:
            yield [*as_it_was, *as_it_was, text]
        elif token in self.engine.sessions:
            stage = gr.update(outlines=self._outlines(session, names))
            yield [*self._pages(session, names), stage, gr.skip(), *as_it_was, text]
        else:  # another picture was opened meanwhile, and nothing has been said of it yet
            yield [EMPTY, EMPTY, gr.update(outlines={}), gr.skip(), *as_it_was, gr.skip()]

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
            session = self.engine.sessions.get(token)
            pages, stage = self._pages(session, names), gr.update(outlines=self._outlines(session, names))
        except UserError:  # no picture yet
            pages, stage = [gr.skip()] * 2, gr.skip()
        return [*pages, *titles, *[gr.skip()] * (2 - len(titles)), second, stage]

    def similarity(self, token: str, drawn: dict[str, Any] | None, model: str, other: str | None) -> list[Any]:
        """Heat-maps of the selected mark. Updates of: the panel, notice."""
        drawn = drawn or NOTHING_DRAWN
        marks, number = drawn.get("marks"), drawn.get("selected")

        def draw(name: str) -> Image.Image:
            self._session(token, drawn)
            return self.engine.similarity(token, name, marks, number)

        return self._panel(token, draw, model, other)

    def tokens(self, token: str, model: str, other: str | None) -> list[Any]:
        """Tokens as colours. Updates of: the panel, notice."""
        return self._panel(token, lambda name: self.engine.tokens(token, name), model, other)

    def save(self, token: str) -> list[Any]:
        """The conversation as a page. Updates of: the page's text, notice."""
        try:
            session = self.engine.sessions.get(token)
            turns = {name: conversation.turns for name, conversation in session.conversations.items()}
            return [saved_page(session.image, turns), ""]
        except Exception as error:
            return ["", notice_html(problem(error))]

    def _open(self, choice: Any) -> tuple[Session, Example | None, str]:
        """The session about a choice, which example it is, and a remark about its file. A choice may hold anything."""
        if not isinstance(choice, dict):
            raise UserError("choose a picture first.")
        if "example" in choice:
            index = choice["example"]
            if type(index) is not int or not 0 <= index < len(self.examples):
                raise UserError("there is no such example.")
            example = self.examples[index]
            return self.engine.open_image(example.image), example, ""
        name, path, size = (choice.get(key) for key in ("name", "path", "size"))
        name = short_name(name if isinstance(name, str) else "")
        if not path and type(size) is int:
            check_size(size, name, self.engine.limits)
        session, note = self.engine.open_bytes(self._uploaded(path, name), name)
        return session, None, note

    def _uploaded(self, path: Any, name: str) -> bytes:
        """The bytes of an upload; of files in the upload folder alone, whatever the page sends."""
        try:
            file = Path(path).resolve()
            if path and file.is_relative_to(self.uploads) and file.is_file():
                return file.read_bytes()
        except (TypeError, ValueError, OSError):  # not a path at all
            pass
        raise UserError(f"{name} did not arrive; choose it again.")

    def _opened(self, session: Session, example: Example | None, note: str) -> list[Any]:
        """Updates of: token, stage, both conversations, question, offers, the picker's fold, both views, notice."""
        width, height = session.image.size
        marks, questions = (example.marks, example.questions) if example else ((), ())
        value = {
            "picture": session.picture,
            "marks": [mark_row(mark) for mark in marks],
            "selected": marks[0].number if marks else None,
            "next": max((mark.number for mark in marks), default=0) + 1,
        }
        stage = gr.update(value=value, picture=data_url(session.image), width=width, height=height, outlines={})
        offers = gr.update(choices=list(questions), value=None, visible=bool(questions))
        remark = notice_html(note, "note")
        closed = gr.update(open=False)
        return [session.token, stage, EMPTY, EMPTY, questions[0] if questions else "", offers, closed, "", "", remark]

    def _session(self, token: str, drawn: dict[str, Any]) -> Session:
        """The session, whose picture must be the one that was drawn on when the event was sent: it may have waited."""
        session = self.engine.sessions.get(token)
        if drawn.get("picture") != session.picture:
            raise UserError("another picture was opened before this one's turn came; ask again.")
        return session

    def _names(self, model: str, other: str | None) -> list[str]:
        """The models of the page's two menus; the second may name none, or the same again."""
        return [model, *([other] if other and other in self.engine.sessions.models and other != model else [])]

    def _pages(self, session: Session, names: list[str]) -> list[Any]:
        pages: list[Any] = [
            conversation_html(session.conversations[name].turns, slot) for name, slot in zip(names, SLOTS, strict=False)
        ]
        return [*pages, *[gr.skip()] * (2 - len(pages))]

    def _outlines(self, session: Session, names: list[str]) -> dict[str, list[dict]]:
        return {slot: outlines(session.conversations[n].turns, slot) for n, slot in zip(names, SLOTS, strict=False)}

    def _panel(self, token: str, draw: Callable[[str], Image.Image], model: str, other: str | None) -> list[Any]:
        names = self._names(model, other)
        try:
            figures = "".join(figure_html(draw(name), name) for name in names)
            kept = token in self.engine.sessions  # or another picture was opened meanwhile
            return [f'<div class="rt-panel">{figures}</div>' if kept else gr.skip(), ""]
        except Exception as error:
            return [gr.skip(), notice_html(problem(error))]


OPENED_PARTS = 10  # what `_opened` updates


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
