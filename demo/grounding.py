"""An answer cut into plain text, words that a box grounds, and the boxes themselves."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ..mllm.boxes import ParsedBoxes, box_format
from ..mllm.boxes.json_syntax import JsonSyntax

_TAG = r"<[^<>\s]{1,40}>"  # of conventions that mark up labels and boxes
_LINKS = "is|are|at|in|it|here|there|located"  # between words and their box: part of neither
_TAIL = re.compile(rf"(?:[\s(\[{{<:=]|{_TAG}|\b(?:{_LINKS})\b)*$", re.IGNORECASE)
_START = re.compile(rf"[.,;:]\s|[\n\])]|{_TAG}")
_LONGEST = 200  # characters before a box that are looked at for its words
_JOINING = re.compile(r"\s*(?:(?:and|or)\s+)?", re.IGNORECASE)


@dataclass(frozen=True)
class Piece:
    """A part of an answer.

    Attributes:
        kind: "text", "words" (what boxes ground) or "box" (the coordinates of one).
        text: its characters; coordinates as the model wrote them.
        boxes: of words the numbers of the boxes they belong to, of a box its own number; from 0 within the answer.
        box_xyxy, score, label: of a box only: pixels of the picture, mean probability of its coordinates' tokens, and
            the words it grounds ("" when the answer has none).
    """

    kind: Literal["text", "words", "box"]
    text: str
    boxes: tuple[int, ...] = ()
    box_xyxy: tuple[float, float, float, float] | None = None
    score: float | None = None
    label: str = ""


def ground_answer(
    text: str, parsed: ParsedBoxes, scores: Sequence[float], convention: str, phrase: str = ""
) -> list[Piece]:
    """Cut an answer into what is shown; tags and JSON around labels and boxes are left out.

    A box grounds the words before it, back to the last box, the last punctuation mark or the beginning; boxes that
    follow each other without words share the earlier words. A convention that writes labels into JSON has them there.

    Args:
        text: the answer.
        parsed: its boxes, with `spans` in this text.
        scores: one a box, or none at all.
        convention: name of the box format.
        phrase: what was asked for; the label of boxes that come without any words.
    """
    if not len(parsed.boxes):
        return [Piece("text", text)] if text else []
    json_labels = (
        _json_labels(text, len(parsed.boxes)) if isinstance(box_format(convention).syntax, JsonSyntax) else None
    )
    pieces: list[Piece] = []
    words_at: int | None = None  # index of the words that the next box without words of its own belongs to
    end = 0
    for index, (start, stop) in enumerate(parsed.spans):
        plain, words, after = _split_words(text[end:start]) if json_labels is None else ("", json_labels[index], " ")
        _add_text(pieces, plain)
        if words:
            words_at = len(pieces)
            pieces.append(Piece("words", words, (index,)))
        elif words_at is not None:
            pieces[words_at] = Piece("words", pieces[words_at].text, (*pieces[words_at].boxes, index))
        _add_text(pieces, after)
        label = pieces[words_at].text if words_at is not None else phrase
        score = scores[index] if index < len(scores) else None
        pieces.append(Piece("box", text[start:stop], (index,), parsed.boxes[index], score, label))
        end = stop
    if json_labels is None:
        _add_text(pieces, text[end:])
    return pieces


def _add_text(pieces: list[Piece], text: str) -> None:
    plain = re.sub(_TAG, "", text)
    if plain.strip(" []();,"):
        pieces.append(Piece("text", plain))
    elif plain and pieces:
        pieces.append(Piece("text", " "))


def found_boxes(pieces: Sequence[Piece]) -> list[Piece]:
    """The boxes of an answer, in its order."""
    return [piece for piece in pieces if piece.kind == "box"]


def _split_words(before: str) -> tuple[str, str, str]:
    """The text before a box as (not grounded, grounded words, marks between words and box)."""
    near = max(0, len(before) - _LONGEST)
    tail = _TAIL.search(before, near)
    assert tail is not None  # it may match nothing, at the end
    body = before[: tail.start()]
    start = max((match.end() for match in _START.finditer(body, near)), default=near)
    joining = _JOINING.match(body, start)
    start = joining.end() if joining else start
    words = body[start:]
    return (body[:start], words, tail[0]) if any(c.isalnum() for c in words) else (before, "", "")


def _json_labels(text: str, count: int) -> list[str]:
    try:
        objects, _ = json.JSONDecoder().raw_decode(text, text.index("["))
    except ValueError:
        return [""] * count
    return [str(entry.get("label") or "") if isinstance(entry, dict) else "" for entry in objects[:count]]
