"""Conversations as rows of token ids of one length, several documents packed into a row."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from ..mllm.boxes import BoxFormat, ImageFrame
from .conversation_ids import turn_text
from .conversations import describe_scene, render_turns, sample_conversation, text_messages
from .records import Record
from .tokenizer import EOS_TOKEN, token_id

IGNORE = -100  # label of a token that the loss leaves out
FILL_TRIES = 4  # further documents tried to fill a row


@dataclass(frozen=True)
class Document:
    """Token ids of one conversation with the end-of-text token, and its labels (`IGNORE` where nothing is learned)."""

    ids: list[int]
    labels: list[int]


class ConversationTexts:
    """Record -> `Document`: a random conversation about the record, the image in text form before it or not.

    scene_text: probability that the description of the scene stands where the image would. max_regions: a record with
    more regions is cut to a random part of them. loss_on: "answers" (the assistant's words) or "all".
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        box_format: BoxFormat,
        mix: Mapping[str, float],
        *,
        turns: int,
        scene_text: float,
        max_regions: int,
        loss_on: Literal["answers", "all"],
    ) -> None:
        self.tokenizer, self.box_format, self.mix = tokenizer, box_format, mix
        self.turns, self.scene_text, self.max_regions = turns, scene_text, max_regions
        self.loss_on = loss_on
        self.eos_id = token_id(tokenizer, EOS_TOKEN)

    def __call__(self, record: Record, rng: random.Random, limit: int) -> Document | None:
        """A document of at most `limit` tokens (turns are left out from the end until it fits).

        None when the record has nothing to ask about, or not even one turn fits.
        """
        if len(record.regions) > self.max_regions:
            record = record.model_copy(update={"regions": rng.sample(record.regions, self.max_regions)})
        frame = ImageFrame.identity((record.width, record.height))
        turns = render_turns(sample_conversation(record, rng, self.mix, self.turns), self.box_format, frame)
        shown = describe_scene(record, rng, self.box_format, frame) if rng.random() < self.scene_text else ""
        if not turns:
            return None
        messages = [
            message["content"] for message in text_messages(turns, self.box_format, frame, shown, record.regions)
        ]
        pairs = list(zip(messages[::2], messages[1::2], strict=True))
        ids: list[int] = []
        answers: list[bool] = []
        pieces = [piece for turn in turn_text(self.tokenizer).pieces(pairs, with_image=False) for piece in turn]
        encoded: list[list[int]] = self.tokenizer(pieces, add_special_tokens=False)["input_ids"]  # pyright: ignore
        for question_ids, answer_ids in zip(encoded[::2], encoded[1::2], strict=True):
            if len(ids) + len(question_ids) + len(answer_ids) + 1 > limit:  # and the end-of-text token
                break
            ids += [*question_ids, *answer_ids]
            answers += [False] * len(question_ids) + [True] * len(answer_ids)
        return self._document(ids, answers) if ids else None

    def _document(self, ids: list[int], answers: list[bool]) -> Document:
        if self.loss_on == "all":
            labels = list(ids)
        else:
            labels = [token if answer else IGNORE for token, answer in zip(ids, answers, strict=True)]
        return Document([*ids, self.eos_id], [*labels, self.eos_id if self.loss_on == "all" else IGNORE])


class PackedTexts(Dataset):
    """Rows of `length` tokens. Row i begins with a conversation about record i and is filled with others.

    Draws from Python's global `random`, which the engine seeds for every item by (seed, epoch, index): every epoch
    brings other conversations, and a resumed run the same ones.
    """

    def __init__(self, records: Sequence[Record], texts: ConversationTexts, length: int) -> None:
        self.records, self.texts, self.length = records, texts, length

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> list[Document]:
        rng = random.Random(random.getrandbits(64))
        documents, room = [], self.length
        for candidate in (index, *(rng.randrange(len(self.records)) for _ in range(FILL_TRIES))):
            document = self.texts(self.records[candidate], rng, room)
            if document is not None:
                documents.append(document)
                room -= len(document.ids)
        return documents


def collate_rows(rows: Sequence[Sequence[Document]], length: int, pad_id: int) -> dict[str, torch.Tensor]:
    """`input_ids`, `labels`, `position_ids`, int64 `(B, length)`, of packed documents.

    Positions start again at 0 with every document and with the padding: transformers reads that as "attend inside your
    own document only", but only without an attention mask and with `use_cache=False`.
    """
    batch = {name: torch.zeros(len(rows), length, dtype=torch.long) for name in ("input_ids", "labels", "position_ids")}
    for number, documents in enumerate(rows):
        space = length - sum(len(document.ids) for document in documents)
        padded = [*documents, Document([pad_id] * space, [IGNORE] * space)]
        batch["input_ids"][number] = torch.tensor([token for document in padded for token in document.ids])
        batch["labels"][number] = torch.tensor([label for document in padded for label in document.labels])
        batch["position_ids"][number] = torch.cat([torch.arange(len(document.ids)) for document in padded])
    # A document's first token must not be learned from the end of the document before.
    batch["labels"][batch["position_ids"] == 0] = IGNORE
    return batch
