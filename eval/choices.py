"""Answers to "is it a cup or a bowl?": which of the two names does the answer give to the region?"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from ..train_stages.phrases import normalise_phrase

# What is denied is not said: "a cup, not a bowl" names the cup (after ml-ferret's eval_lvis.py).
_DENIED = re.compile(r"\b(?:not|no)\b[^,.;]*")


@dataclass(frozen=True)
class ChoiceScore:
    """correct: the answer names the region and does not name the wrong choice. named: the true name, or a synonym, is
    found somewhere in the answer, as Ferret counts it: an answer that repeats the question would pass."""

    correct: bool
    named: bool


def score_choice(answer: str, true_names: Sequence[str], wrong: str) -> ChoiceScore:
    """The score of an answer to a question with two choices.

    Args:
        answer: the text.
        true_names: the true choice and its synonyms.
        wrong: the other choice.

    Names are compared folded (`normalise_phrase`, "_" as a space); for `correct` they must stand as whole words, with a
    plural "s" allowed. Where one choice stands inside the other ("ball", "ball bearing"), the longer one is looked for
    first.
    """
    text = _fold(_DENIED.sub(" ", answer.casefold()))
    names = [_fold(name) for name in true_names]
    false = _fold(wrong)
    named = any(name in text for name in names)
    if any(false in name for name in names):
        rest = _without(text, names)
        return ChoiceScore(rest != text and not _says(rest, false), named)
    rest = _without(text, [false])
    return ChoiceScore(rest == text and any(_says(text, name) for name in names), named)


def _fold(name: str) -> str:
    return normalise_phrase(name.replace("_", " "))


def _pattern(name: str) -> str:
    return rf"\b{re.escape(name)}(?:s|es)?\b"


def _says(text: str, name: str) -> bool:
    return re.search(_pattern(name), text) is not None


def _without(text: str, names: Sequence[str]) -> str:
    for name in sorted(names, key=len, reverse=True):
        text = re.sub(_pattern(name), " ", text)
    return text
