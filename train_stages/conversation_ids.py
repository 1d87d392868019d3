"""A conversation about a picture -> token ids and labels."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from ..mllm.boxes import Boxes, ImageFrame
from ..mllm.processing import RegionLlavaProcessor
from ..vision_towers.errors import UserError
from .conversations import RenderedTurn
from .turn_text import TurnText

IGNORED = -100  # label of a token that is not learned


def conversation_ids(
    processor: RegionLlavaProcessor, turns: Sequence[RenderedTurn], frame: ImageFrame, max_tokens: int
) -> tuple[list[int], list[int], int]:
    """Token ids and labels of a conversation; only answers and the end of their turn are learned.

    The chat template is applied turn by turn and each piece is tokenised alone, exactly as `ChatSession` does when it
    answers, so training and chat see the same ids.

    Args:
        turns: questions with one `<region>` a box (original pixels), and their answers.
        frame: of the picture.
        max_tokens: turns that would exceed it are left out, from the first such turn on.
    Returns:
        ids, labels (`IGNORED` where nothing is learned), and how many turns they hold.
    Raises:
        UserError: not even the first turn fits, or the template rewrites earlier turns.
    """
    ids: list[int] = []
    labels: list[int] = []
    texts = turn_text(processor).pieces([(turn.question, turn.answer) for turn in turns], with_image=True)
    pieces: list[str] = []
    for number, (turn, (asked, answered)) in enumerate(zip(turns, texts, strict=True)):
        write = processor.write if number == 0 else processor.write_regions
        pieces += [write(asked, frame, Boxes(list(turn.boxes))), answered]
    # Two calls instead of one a piece: a call costs as much as the words of ten pieces.
    first = processor.tokenizer(pieces[0])["input_ids"]
    encoded = [first, *processor.tokenizer(pieces[1:], add_special_tokens=False)["input_ids"]]
    for number, (question_ids, answer_ids) in enumerate(zip(encoded[::2], encoded[1::2], strict=True)):
        if len(ids) + len(question_ids) + len(answer_ids) > max_tokens:
            if number == 0:
                needed = len(question_ids) + len(answer_ids)
                raise UserError(
                    f"one turn takes {needed} tokens and max_tokens is {max_tokens}; raise data.max_tokens."
                )
            return ids, labels, number
        ids += [*question_ids, *answer_ids]
        labels += [*([IGNORED] * len(question_ids)), *answer_ids]
    return ids, labels, len(turns)


@lru_cache(maxsize=8)
def turn_text(owner: Any) -> TurnText:
    """The `TurnText` of a tokenizer or processor."""
    return TurnText(
        lambda messages, opening: owner.apply_chat_template(messages, add_generation_prompt=opening, tokenize=False)
    )
