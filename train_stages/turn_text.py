"""What a chat template writes around each turn, rendered once instead of once a turn.

Templates are small programs, and rendering a growing conversation anew for every turn costs more time than the rest of
a sample together. Most of them only put fixed text around each message: `TurnText` finds that text, proves it on trial
conversations, and then joins strings. A template that does more (strips, numbers) is rendered every time. One that
writes the last answer in another way than those before it (Qwen3 puts thoughts before it) is taken by how it writes the
earlier ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from jinja2 import TemplateError

from ..mllm.prompts import assistant_message, user_message
from ..vision_towers.errors import UserError

Render = Callable[[list[dict], bool], str]  # messages, whether the answer's opening follows -> text
Turn = tuple[str, str]  # question, answer

_MARK = "\ue000"  # stands in no real text
_TRIALS: tuple[tuple[Turn, ...], ...] = (
    ((f"{_MARK}q", f"{_MARK}a"), (f"{_MARK}q", f"{_MARK}a"), (f"{_MARK}q", f"{_MARK}a")),
    ((" a? ", " yes "), ("\nb", "<think>c</think> d"), ("", "[1,2,3,4]"), ("{{ x }}", "end\n")),
)


class TurnText:
    """Conversation -> the text that each question and each answer adds.

    render: `apply_chat_template` of a tokenizer or processor, without tokenising.
    """

    def __init__(self, render: Render) -> None:
        self._template = render
        self._frames = self._find_frames()

    def _render(self, messages: list[dict], opening: bool) -> str:
        try:
            return self._template(messages, opening)
        except TemplateError as error:
            raise UserError(f"the chat template refuses the conversation: {str(error).rstrip('.')}.") from error

    def pieces(self, turns: Sequence[Turn], with_image: bool, system: str | None = None) -> list[Turn]:
        """For each turn (what stands before the answer's first word, answer with its end); joined, they are the text of
        the whole conversation.

        with_image: whether the first question holds the picture. system: instructions before the first question; what
        the template writes there by itself when absent.
        Raises:
            UserError: the template rewrites earlier turns, or takes no system message.
        """
        if self._frames is None:
            return self._rendered(turns, with_image, system)
        (first, later, answer), written = self._frames, []
        if system is not None:
            first = _around(self._render(_instructed([user_message(_MARK, False)], system), True), _MARK)
        for number, (question, reply) in enumerate(turns):
            content = user_message(question, with_image and number == 0)["content"]
            before, after = later if number else first
            written.append((before + content + after, answer[0] + reply + answer[1]))
        return written

    def _rendered(self, turns: Sequence[Turn], with_image: bool, system: str | None = None) -> list[Turn]:
        messages: list[dict] = _instructed([], system)
        text, written = "", []
        for number, (question, reply) in enumerate(turns):
            messages.append(user_message(question, with_image and number == 0))
            asked = self._render(messages, True)
            messages.append(assistant_message(reply))
            answered = self._render(messages, False)
            if not (asked.startswith(text) and answered.startswith(asked)):
                raise UserError("the chat template rewrites earlier turns; use one that only appends.")
            written.append((asked[len(text) :], answered[len(asked) :]))
            text = answered
        return written

    def _find_frames(self) -> tuple[Turn, Turn, Turn] | None:
        """(before, after) of the first question, of later questions and of answers; None when there are none."""
        self._frames = None
        try:
            pieces = self._rendered(_TRIALS[0], False)
            first, later = _around(pieces[0][0], f"{_MARK}q"), _around(pieces[1][0], f"{_MARK}q")
            self._frames = first, later, _around(pieces[0][1], f"{_MARK}a")
            for trial in _TRIALS:
                for with_image in (False, True):
                    if self.pieces(trial, with_image) != self._rendered(trial, with_image):
                        return None
        except UserError:
            return self._history_frames()
        except ValueError:
            return None
        return self._frames

    def _history_frames(self) -> tuple[Turn, Turn, Turn] | None:
        """Those of turns that others follow, when an answer is also opened as they are."""
        marks = [f"{_MARK}{number}" for number in range(5)]
        roles = [user_message(mark, False) if n % 2 == 0 else assistant_message(mark) for n, mark in enumerate(marks)]
        try:
            rest, found = self._render(roles, True), []
            for mark in marks:
                before, rest = rest.split(mark)
                found.append(before)
            end = self._render(roles[:2], False).split(marks[1])[1]
        except (UserError, ValueError, IndexError):
            return None
        start, asked, answered, asked_again, answered_again = found
        if not (asked == asked_again == rest and answered == answered_again and answered.startswith(end)):
            return None
        return (start, asked), (answered[len(end) :], asked), ("", end)


def _instructed(messages: list[dict], system: str | None) -> list[dict]:
    return messages if system is None else [{"role": "system", "content": system}, *messages]


def _around(piece: str, mark: str) -> Turn:
    before, after = piece.split(mark)  # a ValueError unless it stands there once
    return before, after
