"""Classes of regions for probes: what a thing is, and what a text says."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ...train_stages.conversations import region_words
from ...train_stages.records import Record
from ...train_stages.region_labels import NO_CLASS, ObjectClasses


def object_labels(classes: ObjectClasses) -> Callable[[Record], list[int]]:
    """The object class of every region that is no text; `NO_CLASS` for the rest."""

    def labels(record: Record) -> list[int]:
        found = classes.labels(record)
        return [NO_CLASS if region.ocr else label for region, label in zip(record.regions, found, strict=True)]

    return labels


def transcripts(records: Sequence[Record]) -> list[str]:
    """The distinct transcripts, sorted."""
    return sorted({region.ocr for record in records for region in record.regions if region.ocr})


def text_labels(words: Sequence[str]) -> Callable[[Record], list[int]]:
    """The place of every region's transcript in `words`; `NO_CLASS` for one that is not there and for no text."""
    ids = {word: number for number, word in enumerate(words)}

    def labels(record: Record) -> list[int]:
        return [ids.get(region.ocr or "", NO_CLASS) for region in record.regions]

    return labels


def words_of(records: Sequence[Record]) -> list[str]:
    """The distinct words of regions (`region_words`: tags, category, transcript), sorted."""
    return sorted({text for record in records for region in record.regions if (text := region_words(region))})


def word_labels(words: Sequence[str]) -> Callable[[Record], list[int]]:
    """The place of every region's words in `words`; `NO_CLASS` for those that are not there."""
    ids = {word: number for number, word in enumerate(words)}

    def labels(record: Record) -> list[int]:
        return [ids.get(region_words(region), NO_CLASS) for region in record.regions]

    return labels
