"""A conversation about a picture, or about none -> token ids and labels."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..mllm.bos import adds_special_tokens
from ..mllm.boxes import Boxes, ImageFrame
from ..mllm.processing import RegionLlavaProcessor
from ..vision_towers.errors import UserError
from .conversations import RenderedTurn
from .turn_text import TurnText

IGNORED = -100  # label of a token that is not learned

_TRIAL = (("What is in it?", "a blue heart"), ("Where is the star?", "[12, 345]"), ("Read it.", "EXIT 7"))


class TooLong(UserError):
    """Not even the first turn of a conversation fits."""


def conversation_ids(
    processor: RegionLlavaProcessor,
    turns: Sequence[RenderedTurn],
    frame: ImageFrame,
    max_tokens: int,
    *,
    with_image: bool = True,
    system: str | None = None,
) -> tuple[list[int], list[int], int]:
    """Token ids and labels of a conversation; only answers and the end of their turn are learned.

    The chat template is applied turn by turn and each piece is tokenised alone, exactly as `ChatSession` does when it
    answers, so training and chat see the same ids. Where a tokenizer joins the end of a piece to the beginning of the
    next one (Vicuna's: there is no token between "ASSISTANT:" and the answer), the conversation is tokenised whole.

    Args:
        turns: questions with one `<region>` a box (original pixels), and their answers.
        frame: of the picture.
        max_tokens: turns that would exceed it are left out, from the first such turn on.
        with_image: whether the first question holds the picture. system: see `TurnText.pieces`.
    Returns:
        ids, labels (`IGNORED` where nothing is learned), and how many turns they hold.
    Raises:
        TooLong: not even the first turn fits.
        UserError: the template rewrites earlier turns, or takes no system message.
    """
    ids: list[int] = []
    labels: list[int] = []
    texts = turn_text(processor).pieces([(turn.question, turn.answer) for turn in turns], with_image, system)
    pieces: list[str] = []
    for number, (turn, (asked, answered)) in enumerate(zip(turns, texts, strict=True)):
        write = processor.write if with_image and number == 0 else processor.write_regions
        pieces += [write(asked, frame, Boxes(list(turn.boxes))), answered]
    encoded = _encoded(processor, pieces)
    for number, (question_ids, answer_ids) in enumerate(zip(encoded[::2], encoded[1::2], strict=True)):
        if len(ids) + len(question_ids) + len(answer_ids) > max_tokens:
            if number == 0:
                needed = len(question_ids) + len(answer_ids)
                raise TooLong(f"one turn takes {needed} tokens and max_tokens is {max_tokens}; raise data.max_tokens.")
            return ids, labels, number
        ids += [*question_ids, *answer_ids]
        learned = _learned(processor.tokenizer, answer_ids)
        labels += [*([IGNORED] * len(question_ids)), *answer_ids[:learned]]
        labels += [IGNORED] * (len(answer_ids) - learned)
    return ids, labels, len(turns)


@lru_cache(maxsize=8)
def turn_text(owner: Any) -> TurnText:
    """The `TurnText` of a tokenizer or processor."""
    return TurnText(
        lambda messages, opening: owner.apply_chat_template(messages, add_generation_prompt=opening, tokenize=False)
    )


def ends_answers(processor: RegionLlavaProcessor) -> bool:
    """Whether the chat template closes an answer with a token that can stop generation; without one, a model never
    learns to stop."""
    ((_, answer),) = turn_text(processor).pieces(_TRIAL[:1], with_image=False)
    ids: list[int] = processor.tokenizer(answer, add_special_tokens=False)["input_ids"]
    return any(token in _special_ids(processor.tokenizer) for token in ids)


def _learned(tokenizer: PreTrainedTokenizerBase, answer_ids: Sequence[int]) -> int:
    """How many tokens of an answer are learned: up to the one that ends it. Many templates put a line break behind it,
    which no model ever gets to write."""
    special = _special_ids(tokenizer)
    return next((n for n in range(len(answer_ids), 0, -1) if answer_ids[n - 1] in special), len(answer_ids))


def _encoded(processor: RegionLlavaProcessor, pieces: Sequence[str]) -> list[list[int]]:
    """The ids of each piece."""
    tokenizer, start = processor.tokenizer, adds_special_tokens(processor.tokenizer, pieces[0])
    if not _separable(processor):
        return _cut(tokenizer, pieces, start)
    # Two calls instead of one a piece: a call costs as much as the words of ten pieces.
    first: Any = tokenizer(pieces[0], add_special_tokens=start)["input_ids"]
    return [first, *tokenizer(list(pieces[1:]), add_special_tokens=False)["input_ids"]]


def _cut(tokenizer: PreTrainedTokenizerBase, pieces: Sequence[str], start: bool) -> list[list[int]]:
    """The ids of the whole text, each in the piece that it begins in."""
    whole: Any = tokenizer("".join(pieces), add_special_tokens=start, return_offsets_mapping=True)
    ends = list(accumulate(len(piece) for piece in pieces))
    found: list[list[int]] = [[] for _ in pieces]
    for token, (begin, end) in zip(whole["input_ids"], whole["offset_mapping"], strict=True):
        # A token of no characters (the sign that a text begins, a space that stands nowhere) goes with the one before.
        place = bisect_right(ends, begin if end > begin else max(0, begin - 1))
        found[min(place, len(pieces) - 1)].append(token)
    return found


@lru_cache(maxsize=8)
def _separable(processor: Any) -> bool:
    """Whether pieces tokenised alone give the ids of the whole text."""
    pieces = [part for turn in turn_text(processor).pieces(_TRIAL, with_image=False) for part in turn]
    tokenizer = processor.tokenizer
    alone = [*tokenizer(pieces, add_special_tokens=False)["input_ids"]]
    whole = tokenizer("".join(pieces), add_special_tokens=False)["input_ids"]
    return [token for piece in alone for token in piece] == whole


@lru_cache(maxsize=8)
def _special_ids(tokenizer: Any) -> frozenset[int]:
    return frozenset(tokenizer.all_special_ids)
