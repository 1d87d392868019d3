"""What a user types -> what the model is asked: chips become regions, shortcuts the questions models are trained on."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..mllm.prompts import IMAGE_TOKEN, LOCATE, POINT, READ, REFER, REGION_TOKEN, sought_phrase
from ..vision_towers import UserError
from .limits import Limits
from .marks import Mark

_CHIP = re.compile(r"\[\s*([^\[\]\n]{1,40}?)\s*\]")
_READ_THIS = re.compile(r"\s*read\s+(?:this|it|that|here)\s*[.?!]*\s*", re.IGNORECASE)
_WHAT_IS_THIS = re.compile(r"\s*what(?:'s|\s+is)\s+(?:this|it|that|here)\s*[.?!]*\s*", re.IGNORECASE)


@dataclass(frozen=True)
class AskedQuestion:
    """One question, ready for the model.

    Attributes:
        text: with one `<region>` a mark of `marks`, in the order of the text.
        marks: what the chips stood for.
        phrase: what is looked for, when the question asks where something is.
    """

    text: str
    marks: tuple[Mark, ...] = ()
    phrase: str = ""


def prepare_question(
    text: str, marks: Sequence[Mark], selected: int | None, special_tokens: Iterable[str], limits: Limits
) -> AskedQuestion:
    """Read a question.

    `[2]` and `[my label]` are the mark of that number or label. "Read this" and "What is this?" without a chip mean the
    selected mark, or the only one; "Find the X" is asked as "Where is X?", the way models here are trained. All else
    goes to the model as it is, less the strings that are special tokens to it.

    Raises:
        UserError: nothing asked, too long, a number that no mark has, or "this" with no mark to mean.
    """
    if len(text) > limits.question_chars:
        raise UserError(f"the question has {len(text)} characters; the limit is {limits.question_chars}.")
    plain = without_tokens(text, (IMAGE_TOKEN, REGION_TOKEN, *special_tokens)).strip()
    if not plain:
        raise UserError("type a question first.")
    if _READ_THIS.fullmatch(plain):
        return AskedQuestion(READ, (_meant(marks, selected),))
    if _WHAT_IS_THIS.fullmatch(plain):
        meant = _meant(marks, selected)
        return AskedQuestion(REFER if meant.point_xy is None else POINT, (meant,))
    if (phrase := sought_phrase(plain)) and not _CHIP.search(plain):
        return AskedQuestion(LOCATE.format(phrase=phrase), phrase=phrase)
    asked: list[Mark] = []

    def chip(match: re.Match[str]) -> str:
        mark = _named(match[1], marks)
        if mark is None:
            return match[0]  # brackets that are no chip are just text
        asked.append(mark)
        return REGION_TOKEN

    return AskedQuestion(_CHIP.sub(chip, plain), tuple(asked))


def without_tokens(text: str, tokens: Iterable[str]) -> str:
    """The text with every token's string taken out, so that nobody writes another's turn or a second picture."""
    known = [token for token in tokens if token]
    while any(token in text for token in known):  # what is left may join to another one
        for token in known:
            text = text.replace(token, "")
    return text


def _named(name: str, marks: Sequence[Mark]) -> Mark | None:
    if name.isdecimal():
        mark = next((mark for mark in marks if mark.number == int(name)), None)
        if mark is None:
            there = ", ".join(f"[{mark.number}]" for mark in marks) or "none is drawn yet"
            raise UserError(f"there is no mark [{name}] on the picture ({there}).")
        return mark
    return next((mark for mark in marks if mark.label and mark.label.casefold() == name.casefold()), None)


def _meant(marks: Sequence[Mark], selected: int | None) -> Mark:
    chosen = next((mark for mark in marks if mark.number == selected), None)
    if chosen is not None:
        return chosen
    if len(marks) == 1:
        return marks[0]
    if not marks:
        raise UserError("draw a box or a point first: the question says 'this'.")
    raise UserError("which one is meant by 'this'? Select a box, or write its chip, like [1].")
