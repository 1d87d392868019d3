"""Classes of regions for probes: what a thing is, and what a text says."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ...train_stages.conversations import region_words
from ...train_stages.records import Record, Region
from ...train_stages.region_labels import NO_CLASS, ObjectClasses, ObjectLabels, class_name


def object_classes(records: Sequence[Record], source: ObjectLabels) -> tuple[list[str], Callable[[Record], list[int]]]:
    """The names of the objects' classes in `records`, sorted, and the place of each region's class among them;
    `NO_CLASS` for the rest. There may be none.

    A region with a transcript is a text and no object. Stuff counts, as ground is a region like others, but for crowds:
    stuff of a category that is a thing elsewhere in `records`.

    Raises:
        UserError: another `source`.
    """
    regions = [region for record in records for region in record.regions]
    things = {region.category for region in regions if not region.stuff}

    def name_of(region: Region) -> str | None:
        crowd = region.stuff and region.category in things
        return None if region.ocr or crowd else class_name(region, source)

    names = sorted({name for region in regions if (name := name_of(region)) is not None})
    ids: dict[str | None, int] = {name: number for number, name in enumerate(names)}
    return names, lambda record: [ids.get(name_of(region), NO_CLASS) for region in record.regions]


def object_labels(classes: ObjectClasses) -> Callable[[Record], list[int]]:
    """The class in `classes` of every region that is no text; `NO_CLASS` for the rest."""

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
