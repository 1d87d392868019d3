"""A conversation as HTML. Whatever a user or a model wrote is escaped here and nowhere else; nothing else is put in."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape

from .conversation import Turn
from .grounding import Piece, found_boxes
from .marks import Mark

LABEL_CHARS = 32  # of a box's words beside it in a picture; the answer has them whole
EMPTY = '<p class="rt-empty">Questions and answers come here. In a question, <b>[1]</b> is box 1.</p>'


def conversation_html(turns: Sequence[Turn], slot: str) -> str:
    """All turns. `slot` is a letter that tells side-by-side conversations apart in the ids of their boxes."""
    return "".join(turn_html(turn, slot) for turn in turns) or EMPTY


def turn_html(turn: Turn, slot: str) -> str:
    """One question and its answer."""
    return (
        f'<article class="rt-turn" data-turn="{slot}{turn.number}">'
        f'<div class="rt-question">{question_html(turn, slot)}</div>'
        f'<div class="rt-answer" data-state="{turn.state}">{_answer(turn, slot)}</div>'
        f'<div class="rt-remark">{escape(remark(turn))}</div></article>'
    )


def question_html(turn: Turn, slot: str) -> str:
    """The question as typed, its chips linked with what they stood for when it was asked."""
    marks = {f"[{mark.number}]": place for place, mark in enumerate(turn.asked.marks)}
    marks |= {f"[{mark.label.casefold()}]": place for place, mark in enumerate(turn.asked.marks) if mark.label}
    html, linked = "", set()
    for part in re.split(r"(\[[^\[\]\n]*\])", turn.question):
        place = marks.get(" ".join(part.casefold().split()))
        if place is None:
            html += escape(part)
        else:
            html += _chip(part, asked_id(slot, turn, place))
            linked.add(place)
    for place, mark in enumerate(turn.asked.marks):  # "this"
        if place not in linked and f"[{mark.number}]" not in turn.question:
            html += " " + _chip(f"[{mark.number}]", asked_id(slot, turn, place))
    return html


def remark(turn: Turn) -> str:
    """What stands under an answer in small letters."""
    if turn.state == "failed":
        return turn.error
    if turn.state == "answering":
        return "answering ..."
    count = len(found_boxes(turn.pieces))
    found = {
        "boxes": f"{count} box{'es' if count != 1 else ''}",
        "none": "nothing found" if turn.asked.phrase else "",
        "malformed": "its boxes cannot be read",
    }.get(turn.status, "")
    times = f"first token after {turn.first_token_seconds:.2f} s" if turn.first_token_seconds is not None else ""
    stopped = "stopped; the model does not remember this turn" if turn.state == "stopped" else ""
    return " · ".join(filter(None, (stopped, found, times)))


def asked_id(slot: str, turn: Turn, place: int) -> str:
    """Id of a region that a question named, shared by its chip and its outline."""
    return f"{slot}{turn.number}q{place}"


def box_id(slot: str, turn: Turn, index: int) -> str:
    """Id of a box of an answer, shared by its words and its outline."""
    return f"{slot}{turn.number}b{index}"


def outlines(turns: Sequence[Turn], slot: str) -> list[dict]:
    """What the picture can show of a conversation: `{"id", "turn", "box_xyxy", "text", "kind", "last"}` each.

    kind: "asked" or "found"; last: of the last turn that has boxes of this kind, shown without being pointed at.
    """
    found: list[dict] = []
    with_boxes = [turn.number for turn in turns if found_boxes(turn.pieces)]
    for turn in turns:
        for place, mark in enumerate(turn.asked.marks):
            found.append(_outline(asked_id(slot, turn, place), turn, mark.box_xyxy, mark_text(mark), "asked", False))
        for piece in found_boxes(turn.pieces):
            last, own = turn.number == with_boxes[-1], box_id(slot, turn, piece.boxes[0])
            found.append(_outline(own, turn, piece.box_xyxy, box_text(piece), "found", last))
    return found


def mark_text(mark: Mark) -> str:
    """What stands at a mark in a picture."""
    return f"[{mark.number}] {mark.label}".strip()


def box_text(piece: Piece) -> str:
    """What stands at a box of an answer in a picture."""
    score = f"{piece.score:.2f}" if piece.score is not None else ""
    label = piece.label if len(piece.label) <= LABEL_CHARS else piece.label[: LABEL_CHARS - 1].rstrip() + "…"
    return " ".join(filter(None, (label or str(piece.boxes[0] + 1), score)))


def _outline(id_: str, turn: Turn, box_xyxy, text: str, kind: str, last: bool) -> dict:
    return {"id": id_, "turn": turn.number, "box_xyxy": list(box_xyxy), "text": text, "kind": kind, "last": last}


def _answer(turn: Turn, slot: str) -> str:
    if not turn.pieces:
        return escape(turn.answer) + ('<span class="rt-cursor">▍</span>' if turn.state == "answering" else "")
    parts, worded = [], {index for piece in turn.pieces if piece.kind == "words" for index in piece.boxes}
    for piece in turn.pieces:
        ids = " ".join(box_id(slot, turn, index) for index in piece.boxes)
        if piece.kind == "text":
            parts.append(escape(piece.text))
        elif piece.kind == "words":
            parts.append(f'<span class="rt-words" tabindex="0" data-boxes="{ids}">{escape(piece.text)}</span>')
        else:
            parts.append(_box(piece, ids, named=piece.boxes[0] not in worded))
    return "".join(parts)


def _box(piece: Piece, ids: str, named: bool) -> str:
    """A box in the text; `named` when the answer has no words for it, and what was asked for stands in."""
    score = f'<span class="rt-score">{piece.score:.2f}</span>' if piece.score is not None else ""
    title = escape(f"{piece.text}: mean probability of these tokens {piece.score:.2f}" if score else piece.text)
    text = f"{piece.label} ▢{piece.boxes[0] + 1}" if named and piece.label else f"▢{piece.boxes[0] + 1}"
    return f'<span class="rt-box" tabindex="0" data-boxes="{ids}" title="{title}">{escape(text)} {score}</span>'


def _chip(text: str, id_: str) -> str:
    return f'<span class="rt-chip" tabindex="0" data-boxes="{id_}">{escape(text)}</span>'
