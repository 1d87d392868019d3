"""What the demo does, without any page: open a picture, ask, look at the tower. The page and the HTTP API call this."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from ..vision_towers import UserError
from .conversation import Conversation, Turn
from .limits import Limits
from .marks import Mark, read_marks
from .models import DemoModel
from .questions import prepare_question
from .sessions import Session, Sessions
from .tower_views import similarity_picture, token_picture
from .uploads import read_picture


@dataclass
class Engine:
    """The models of a demo and everybody's sessions with them."""

    models: list[DemoModel]
    limits: Limits

    def __post_init__(self) -> None:
        self.sessions = Sessions(self.models, self.limits)

    def open_bytes(self, data: bytes, name: str) -> tuple[Session, str]:
        """A session about an uploaded file, and a remark about the file ("" = none to make).

        Raises:
            UserError: as `read_picture` and `Sessions.open`.
        """
        upload = read_picture(data, name, self.limits)
        return self.open_image(upload.image), upload.note

    def open_image(self, image: Image.Image) -> Session:
        """A session about a picture that is known to be good."""
        return self.sessions.open(image)

    def ask(
        self,
        token: str | None,
        names: Sequence[str],
        question: str,
        marks: Any = None,
        *,
        selected: int | None = None,
        region_prompt: str | None = None,
        max_new_tokens: int = 128,
    ) -> Iterator[dict[str, Turn]]:
        """Ask one or two models; yields every model's turn so far, by name, whenever one of them has more.

        Models answer in step, token by token.

        Args:
            token: of a session.
            names: the models to ask.
            question: as typed, with chips.
            marks: as `read_marks` takes them; chips speak of them.
            selected: number of the mark that "this" means.
            region_prompt: as `Conversation.use_prompt`; None = as before.
        Raises:
            UserError: something about the question; all conversations stay as they were.
        """
        session = self.sessions.get(token)
        conversations = {name: self._conversation(session, name) for name in dict.fromkeys(names)}
        if not conversations:
            raise UserError("choose a model to ask.")
        drawn = read_marks(marks, session.image.size, self.limits)
        asked = {
            name: prepare_question(question, drawn, selected, special_tokens(conversation.model), self.limits)
            for name, conversation in conversations.items()
        }
        with session.turn():
            for conversation in conversations.values():
                if region_prompt is not None:
                    conversation.use_prompt(region_prompt)
            streams = {
                name: conversation.ask(question, asked[name], max_new_tokens, session.stop)
                for name, conversation in conversations.items()
            }
            turns: dict[str, Turn] = {}
            try:
                while streams:
                    for name, stream in list(streams.items()):
                        turn = next(stream, None)
                        if turn is None:
                            del streams[name]
                            continue
                        turns[name] = turn
                        yield turns
            finally:
                for stream in streams.values():
                    stream.close()  # pyright: ignore[reportAttributeAccessIssue] - a generator

    def stop(self, token: str | None) -> None:
        """End the answer being written in a session; nothing happens when there is none."""
        self.sessions.get(token).stop.set()

    def restart(self, token: str | None) -> None:
        """Forget what was said in a session and keep its picture.

        Raises:
            UserError: it is answering.
        """
        session = self.sessions.get(token)
        with session.turn():
            for conversation in session.conversations.values():
                conversation.restart()

    def similarity(self, token: str | None, name: str, marks: Any, number: int | None) -> Image.Image:
        """`similarity_picture` of one mark: `number`, or the only or last one there is.

        Raises:
            UserError: no mark, or no such one.
        """
        session = self.sessions.get(token)
        mark = chosen_mark(read_marks(marks, session.image.size, self.limits), number)
        with session.turn():
            chat = self._conversation(session, name).chat
            return similarity_picture(chat, session.image, mark.box_xyxy)

    def tokens(self, token: str | None, name: str) -> Image.Image:
        """`token_picture` of the session's picture."""
        session = self.sessions.get(token)
        with session.turn():
            return token_picture(self._conversation(session, name).chat, session.image.size)

    def _conversation(self, session: Session, name: str) -> Conversation:
        self.sessions.model(name)
        return session.conversations[name]


def chosen_mark(marks: Sequence[Mark], number: int | None) -> Mark:
    """The mark of that number; without a number the last one."""
    if not marks:
        raise UserError("draw a box or a point first.")
    mark = marks[-1] if number is None else next((mark for mark in marks if mark.number == number), None)
    if mark is None:
        raise UserError(f"there is no mark [{number}] on the picture.")
    return mark


def special_tokens(model: DemoModel) -> list[str]:
    """Strings that mean something to the model beyond their letters."""
    tokenizer = model.processor.tokenizer
    return [str(token) for token in {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}]
