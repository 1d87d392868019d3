"""What one model and one user say about one picture."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from threading import Event
from typing import Literal, get_args

from PIL import Image

from ..mllm import ChatSession
from ..mllm.processing import RegionPrompt
from ..vision_towers import UserError
from .grounding import Piece, ground_answer
from .limits import Limits
from .models import DemoModel
from .questions import AskedQuestion

REGION_PROMPTS: tuple[str, ...] = get_args(RegionPrompt)
OWN_PROMPT = "own"  # the one a model was trained with
TurnState = Literal["answering", "done", "stopped", "failed"]


@dataclass
class Turn:
    """One question and its answer.

    Attributes:
        number: from 1, within the conversation.
        question: as the user typed it, chips and all.
        asked: the question the model got.
        answer: the text so far; `pieces` is the same text cut into words and boxes once it is whole.
        status: "boxes", "none" or "malformed", as `ParsedBoxes` says it; "" until the answer is whole.
        state: how far it is. A stopped or failed turn is not part of what the model remembers.
        first_token_seconds, seconds: from the moment the model was asked; None until known.
    """

    number: int
    question: str
    asked: AskedQuestion
    answer: str = ""
    pieces: list[Piece] = field(default_factory=list)
    status: str = ""
    state: TurnState = "answering"
    error: str = ""
    first_token_seconds: float | None = None
    seconds: float | None = None


class Conversation:
    """Turns of one model about one picture. The tower runs once, when the first question comes."""

    def __init__(self, model: DemoModel, image: Image.Image, limits: Limits):
        self.model, self.image, self.limits = model, image, limits
        self.turns: list[Turn] = []
        self.region_prompt = model.processor.region_prompt
        self._chat: ChatSession | None = None
        self._asked = 0

    @property
    def chat(self) -> ChatSession:
        """The model's session, made when it is first needed."""
        if self._chat is None:
            self._chat = ChatSession(self.model.model, self._processor(), self.image)
        return self._chat

    def use_prompt(self, region_prompt: str) -> None:
        """Take a region prompt (one of `REGION_PROMPTS`, or `OWN_PROMPT`); another one than before begins a new
        conversation.

        Raises:
            UserError: no such region prompt.
        """
        wanted = self.model.processor.region_prompt if region_prompt == OWN_PROMPT else region_prompt
        if wanted not in REGION_PROMPTS:
            known = ", ".join((OWN_PROMPT, *REGION_PROMPTS))
            raise UserError(f"region_prompt must be one of {known}, got {region_prompt!r}.")
        if wanted != self.region_prompt:
            self.region_prompt = wanted
            self.restart()

    def restart(self) -> None:
        """Forget what was said; the encoded picture stays."""
        self.turns = []
        if self._chat is not None:
            self._chat.restart(self._processor())

    def ask(self, question: str, asked: AskedQuestion, max_new_tokens: int, stop: Event) -> Iterator[Turn]:
        """Answer one question; yields the turn again whenever more of it is there, and last when it is over.

        Setting `stop`, or closing the generator, ends the answer at the next token; the model then forgets the turn.

        Raises:
            UserError: too many turns, or a question the model cannot take; the conversation stays as it was.
        """
        if len(self.turns) >= self.limits.turns:
            raise UserError(f"this conversation has {self.limits.turns} turns, the most there can be; start another.")
        self._asked += 1
        turn = Turn(self._asked, question, asked)
        started = time.perf_counter()
        chat = self.chat
        chat.max_new_tokens = max(1, min(int(max_new_tokens), self.limits.new_tokens))
        stream = chat.stream(asked.text, [mark.box_xyxy for mark in asked.marks])
        self.turns.append(turn)
        try:
            yield turn
            for piece in stream:
                if stop.is_set():
                    turn.state = "stopped"
                    break
                if piece and turn.first_token_seconds is None:
                    turn.first_token_seconds = time.perf_counter() - started
                turn.answer += piece
                yield turn
            if turn.state == "answering":
                self._finish(turn, chat)
        except GeneratorExit:
            turn.state = "stopped"
            raise
        except UserError:
            self.turns.remove(turn)
            raise
        except Exception:
            turn.state, turn.error = "failed", "The model failed on this question; the log of the server says how."
            raise
        finally:
            stream.close()  # pyright: ignore[reportAttributeAccessIssue] - a generator
            turn.seconds = time.perf_counter() - started
        yield turn

    def _finish(self, turn: Turn, chat: ChatSession) -> None:
        found = chat.last_answer
        turn.answer, turn.status, turn.state = found.text, found.boxes.status, "done"
        # The spans of the answer count its leading spaces, too: read the shown text again, by the same convention.
        shown = chat.processor.parse_boxes(found.text, chat.frame)
        turn.pieces = ground_answer(
            found.text, shown, found.boxes.scores or [], chat.processor.box_format, turn.asked.phrase
        )

    def _processor(self):
        processor = copy.copy(self.model.processor)
        processor.region_prompt = self.region_prompt
        return processor
