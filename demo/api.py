"""The demo's functions for programs, as endpoints of the same server: `gradio_client`, or POST and server-sent events.

Their schema is what the annotations here say; the server shows it at `/gradio_api/info`. No endpoint takes or gives a
path: pictures travel as base64.
"""

# No `from __future__ import annotations` here: Gradio reads the annotations as types.

import base64
import binascii
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any, NotRequired, TypedDict

import gradio as gr
from PIL import Image

from .conversation import Turn
from .engine import Engine
from .grounding import found_boxes
from .handlers import problem
from .pictures import data_url
from .saved_page import saved_page

# Of events that decode a picture, which takes much memory for a moment; the page's and the API's wait for each other.
OPENING: dict[str, Any] = {"concurrency_limit": 2, "concurrency_id": "picture"}


# Endpoints that make room: taken even when the queue is full.
ALWAYS = ("stop", "close")


class MarkFields(TypedDict):
    """A box or a point; one of `box_xyxy` and `point_xy`, in pixels of the picture."""

    number: int
    box_xyxy: NotRequired[list[float]]
    point_xy: NotRequired[list[float]]
    label: NotRequired[str]


class OpenedFields(TypedDict):
    """`session` is the key to everything else, and a secret: who has it can read the conversation."""

    session: str
    width: int
    height: int
    note: str


class BoxFields(TypedDict):
    """A box of an answer, the words it grounds, and the mean probability of its coordinates' tokens."""

    box_xyxy: list[float]
    score: float | None
    words: str


class AnswerFields(TypedDict):
    """An answer so far. `state`: answering, done, stopped or failed; `status`, once done: boxes, none or malformed."""

    model: str
    answer: str
    state: str
    status: str
    boxes: list[BoxFields]
    first_token_seconds: float | None


class ModelFields(TypedDict):
    """A model of this server."""

    name: str
    tower: str
    region_readout: str
    image_size: int
    language_model: str
    parameters: int
    box_format: str
    region_prompt: str


def add_api(engine: Engine) -> None:
    """Add the endpoints to the page that is being built."""
    first = engine.models[0].name

    def models() -> list[ModelFields]:
        """The models that can be asked; the first is the default."""
        return [ModelFields(**model.summary()) for model in engine.models]

    def open_picture(picture_base64: str, name: str = "picture") -> OpenedFields:
        """Open a picture, given as the base64 of its file; `name` is used in messages alone."""
        session, note = engine.open_bytes(_decoded(picture_base64), name)
        return OpenedFields(session=session.token, width=session.image.width, height=session.image.height, note=note)

    def answers(
        session: str, question: str, marks: list[MarkFields], model: str, region_prompt: str, max_new_tokens: int
    ) -> Iterator[AnswerFields]:
        name = model or first
        steps = engine.ask(
            session, [name], question, marks, region_prompt=region_prompt or None, max_new_tokens=max_new_tokens
        )
        for turns in steps:
            yield answer_fields(name, turns[name])

    def ask(
        session: str,
        question: str,
        marks: list[MarkFields] = [],  # noqa: B006 - Gradio shows the default and never changes it
        model: str = "",
        region_prompt: str = "",
        max_new_tokens: int = 128,
    ) -> AnswerFields:
        """Ask a question; `[1]` in it is mark 1. The conversation goes on from the session's earlier questions.

        model: "" = the first. region_prompt: "" = as it is, "own" = the model's; another one begins a new conversation.
        """
        *_, last = answers(session, question, marks, model, region_prompt, max_new_tokens)
        return last

    def ask_stream(
        session: str,
        question: str,
        marks: list[MarkFields] = [],  # noqa: B006
        model: str = "",
        region_prompt: str = "",
        max_new_tokens: int = 128,
    ) -> AnswerFields:  # pyright: ignore[reportInvalidTypeForm] - what each piece is
        """As `ask`; the answer comes again and again, longer each time, and last with its boxes."""
        yield from answers(session, question, marks, model, region_prompt, max_new_tokens)  # pyright: ignore

    def stop(session: str) -> None:
        """End the answer that is being written in a session; the model does not remember that turn."""
        engine.stop(session)

    def restart(session: str) -> None:
        """Forget what was said and keep the picture."""
        engine.restart(session)

    def similarity(session: str, marks: list[MarkFields], number: int, model: str = "") -> str:
        """Where the tower finds the picture like mark `number`: a PNG as a data address, of the picture's size."""
        return _png(engine.similarity(session, model or first, marks, number))

    def tokens(session: str, model: str = "") -> str:
        """The tower's tokens as colours: a PNG as a data address, of the picture's size."""
        return _png(engine.tokens(session, model or first))

    def page(session: str) -> str:
        """The conversations of a session as one HTML file."""
        opened = engine.sessions.get(session)
        return saved_page(opened.image, {name: talk.turns for name, talk in opened.conversations.items()})

    def close(session: str) -> None:
        """Forget a session."""
        engine.sessions.close(session)

    working: dict[str, Any] = {"concurrency_limit": engine.limits.at_once, "concurrency_id": "model"}
    gr.api(_told(open_picture), api_name="open_picture", **OPENING)  # pyright: ignore[reportPrivateImportUsage]
    for function in (models, restart, page, close):
        gr.api(_told(function), api_name=function.__name__)  # pyright: ignore[reportPrivateImportUsage]
    for function in (ask, ask_stream, similarity, tokens):
        gr.api(_told(function), api_name=function.__name__, **working)  # pyright: ignore[reportPrivateImportUsage]
    gr.api(_told(stop), api_name="stop", queue=False)  # pyright: ignore[reportPrivateImportUsage]


def answer_fields(model: str, turn: Turn) -> AnswerFields:
    """A turn as the endpoints give it."""
    boxes = [
        BoxFields(box_xyxy=[round(edge, 2) for edge in piece.box_xyxy or ()], score=piece.score, words=piece.label)
        for piece in found_boxes(turn.pieces)
    ]
    return AnswerFields(
        model=model,
        answer=turn.answer,
        state=turn.state,
        status=turn.status,
        boxes=boxes,
        first_token_seconds=turn.first_token_seconds,
    )


def _told(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with its exceptions told to the caller: a user's mistake as it is, a bug in one short sentence."""
    if inspect.isgeneratorfunction(function):

        @functools.wraps(function)
        def stream(*args: Any, **kwargs: Any) -> Iterator[Any]:
            try:
                yield from function(*args, **kwargs)
            except gr.Error:
                raise
            except Exception as error:
                raise gr.Error(problem(error)) from None

        return stream

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except gr.Error:
            raise
        except Exception as error:
            raise gr.Error(problem(error)) from None

    return call


def _decoded(text: str) -> bytes:
    _, _, encoded = text.rpartition(",") if text.startswith("data:") else ("", "", text)
    try:
        return base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError):
        raise gr.Error("picture_base64 is not base64.") from None


def _png(image: Image.Image) -> str:
    return data_url(image, exact=True)
