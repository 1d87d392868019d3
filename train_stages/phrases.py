"""Which region does a phrase mean? A phrase that stands at several regions of an image has several referents.

Two spellings of one phrase (case, spaces) are one phrase. Phrases of `points` are not counted: a point usually lies on
a region that carries the phrase already. `absent` phrases have no referent and do not appear.
"""

from __future__ import annotations

import unicodedata
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # records.py needs normalise_phrase
    from .records import Record


@lru_cache(maxsize=1 << 16)  # the same phrases come back in every epoch
def normalise_phrase(text: str) -> str:
    """Fold case, Unicode composition and runs of white space: `"The  Red\\tcup "` -> `"the red cup"`."""
    return " ".join(unicodedata.normalize("NFC", text).casefold().split())


def phrase_referents(record: Record) -> dict[str, list[int]]:
    """Normalised phrase -> indices (ascending, each once) of the regions of `record` whose `texts` contain it."""
    referents: dict[str, list[int]] = {}
    for index, region in enumerate(record.regions):
        for phrase in dict.fromkeys(normalise_phrase(text) for text in region.texts):
            referents.setdefault(phrase, []).append(index)
    return referents


def unique_texts(record: Record) -> dict[str, int]:
    """Normalised phrase -> index of the one region it is true of: what single-box tasks may ask."""
    return {phrase: indices[0] for phrase, indices in phrase_referents(record).items() if len(indices) == 1}


def shared_texts(record: Record) -> dict[str, list[int]]:
    """Normalised phrase -> indices of the regions it is true of, for phrases with two or more referents."""
    return {phrase: indices for phrase, indices in phrase_referents(record).items() if len(indices) > 1}


def unique_phrases(record: Record) -> list[tuple[str, int]]:
    """`unique_texts` as written: (phrase in its first spelling, region index), in the order of the regions."""
    unique = unique_texts(record)
    seen: set[str] = set()
    phrases: list[tuple[str, int]] = []
    for index, region in enumerate(record.regions):
        for text in region.texts:
            key = normalise_phrase(text)
            if key in unique and key not in seen:
                seen.add(key)
                phrases.append((text, index))
    return phrases
