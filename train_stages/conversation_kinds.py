"""The kinds of turn: each is a function (record, rng) -> iterator of turns that are true of the record.

Turns come lazily, in random order, and each at most once. A record without the field that a kind needs gives none.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from ..mllm import prompts
from ..mllm.boxes import Points
from .phrases import normalise_phrase, shared_texts, unique_phrases
from .plurals import plural
from .records import Record, Region
from .tokenizer import SPECIAL_TOKENS

T = TypeVar("T")
Box = tuple[float, float, float, float]

LARGER_BY = 1.3  # ratio of box areas from which one region is called larger; nearer than that nobody is asked
MAX_LISTED = 10  # an image with more objects is not asked to be listed
COLOR_WORDS = frozenset(
    {"red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white", "gray", "cyan", "magenta"}
)


@dataclass(frozen=True)
class BoxList:
    """Boxes (original pixels) to be written into an answer, with one label each or without labels."""

    boxes: tuple[Box, ...]
    labels: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Turn:
    """One question and its answer, boxes in original pixels.

    question: text with one `<region>` for each of `question_boxes`. answer: strings and box lists, to be joined.
    regions: indices of the record's regions that the turn gives something away about.
    """

    kind: str
    question: str
    answer: tuple[str | BoxList, ...]
    question_boxes: tuple[Box, ...] = ()
    regions: frozenset[int] = frozenset()


def grounding(record: Record, rng: random.Random) -> Iterator[Turn]:
    """A phrase true of one region -> its box. Every region once, before any region's second phrase."""
    by_region = [_shuffled(phrases, rng) for phrases in _unique_by_region(record).values()]
    for turn_of_all in itertools.zip_longest(*_shuffled(by_region, rng)):
        for phrase, index in filter(None, turn_of_all):
            yield _locate("grounding", phrase, record, [index])


def named(record: Record, rng: random.Random) -> Iterator[Turn]:
    """A phrase of a region's own words, true of it alone -> its box.

    Among all phrases of a region these are few ("red star" beside ten of the kind "star left of the blue moon"), and
    those of `absent` are of this form: without such turns, a short phrase alone would say that nothing fits.
    """
    for index, phrases in _shuffled(list(_unique_by_region(record).items()), rng):
        region = record.regions[index]
        own = own_words([region]) | {*f'"{region.ocr}"'.split()}
        short = [phrase for phrase, _ in phrases if all(word in own for word in phrase.split())]
        if short:
            yield _locate("named", rng.choice(short), record, [index])


def several(record: Record, rng: random.Random) -> Iterator[Turn]:
    """A phrase true of two or more regions -> all their boxes in reading order."""
    for key, indices in _shuffled(list(shared_texts(record).items()), rng):
        phrase = next(text for text in record.regions[indices[0]].texts if normalise_phrase(text) == key)
        if is_plain(phrase):
            yield _locate("several", phrase, record, indices)


def absent(record: Record, rng: random.Random) -> Iterator[Turn]:
    """A phrase true of nothing here -> `prompts.NO_BOX`."""
    for phrase in _shuffled([text for text in record.absent if is_plain(text)], rng):
        yield Turn("absent", prompts.LOCATE.format(phrase=phrase), (prompts.NO_BOX,))


def referring(record: Record, rng: random.Random) -> Iterator[Turn]:
    """A box -> the `canonical_phrase` among those true of its region alone."""
    for index, phrases in _shuffled(list(_unique_by_region(record).items()), rng):
        answer = canonical_phrase([phrase for phrase, _ in phrases], [record.regions[index]])
        yield _about("referring", prompts.REFER, answer, record, index)


def reading(record: Record, rng: random.Random) -> Iterator[Turn]:
    """A box with a transcript -> the transcript."""
    for index, region in _shuffled_regions(record, rng):
        if region.ocr and is_plain(region.ocr):
            yield _about("reading", prompts.READ, region.ocr, record, index)


def region_caption(record: Record, rng: random.Random) -> Iterator[Turn]:
    """A box -> one of the region's captions."""
    for index, region in _shuffled_regions(record, rng):
        for caption in _shuffled([text for text in region.captions if is_plain(text)], rng)[:1]:
            yield _about("region_caption", prompts.DESCRIBE_REGION, caption, record, index)


def image_caption(record: Record, rng: random.Random) -> Iterator[Turn]:
    """The image -> one of its captions."""
    for caption in _shuffled([text for text in record.captions if is_plain(text)], rng)[:1]:
        yield Turn("image_caption", prompts.DESCRIBE_IMAGE, (caption,))


def classify(record: Record, rng: random.Random) -> Iterator[Turn]:
    """A box -> the region's category."""
    for index, region in _shuffled_regions(record, rng):
        if region.category and is_plain(region.category):
            yield _about("classify", prompts.CLASSIFY, region.category, record, index)


def count(record: Record, rng: random.Random) -> Iterator[Turn]:
    """A category -> how many of its regions are here. Not asked of categories that occur as stuff (crowds, grass)."""
    categories = [region.category for region in record.regions if region.category and is_plain(region.category)]
    stuff = {region.category for region in record.regions if region.stuff}
    for category in _shuffled([name for name in dict.fromkeys(categories) if name not in stuff], rng):
        question = prompts.COUNT.format(noun=plural(category))
        yield Turn("count", question, (str(categories.count(category)),))


def compare(record: Record, rng: random.Random) -> Iterator[Turn]:
    """Two objects -> which box is larger (by `LARGER_BY` at least), same colour or not, same category or not."""
    objects = [index for index, region in enumerate(record.regions) if region.category and not region.stuff]
    for first, second in _shuffled(list(itertools.permutations(objects, 2)), rng):
        questions = list(_comparisons(record.regions[first], record.regions[second]))
        if questions:
            question, answer = rng.choice(questions)
            boxes = (record.regions[first].box_xyxy, record.regions[second].box_xyxy)
            yield Turn("compare", question, (answer,), boxes, frozenset((first, second)))


def point(record: Record, rng: random.Random) -> Iterator[Turn]:
    """A point (as the 5 px box around it) -> `canonical_phrase` of what is true there."""
    for label in _shuffled(record.points, rng):
        texts = [text for text in label.texts if is_plain(text)]
        if texts:
            (box,) = Points([label.xy]).to_boxes().clip(record.width, record.height)
            under = [index for index, region in enumerate(record.regions) if contains(region.box_xyxy, label.xy)]
            answer = canonical_phrase(texts, [record.regions[index] for index in under])
            yield Turn("point", prompts.POINT, (answer,), (box,), frozenset(under))


def listing(record: Record, rng: random.Random) -> Iterator[Turn]:
    """The image -> every object's box and name in reading order; only where every object has a name."""
    objects = {index: region for index, region in enumerate(record.regions) if not region.stuff}
    names = {index: region.category or region.ocr or "" for index, region in objects.items()}
    if 0 < len(objects) <= MAX_LISTED and all(is_plain(name) for name in names.values()):
        order = reading_order([region.box_xyxy for region in objects.values()])
        indices = [list(objects)[position] for position in order]
        boxes = BoxList(tuple(objects[i].box_xyxy for i in indices), tuple(names[i] for i in indices))
        yield Turn("listing", prompts.LIST_ALL, (boxes,), regions=frozenset(indices))


KINDS: dict[str, Callable[[Record, random.Random], Iterator[Turn]]] = {
    kind.__name__: kind
    for kind in (
        grounding,
        named,
        referring,
        reading,
        region_caption,
        image_caption,
        absent,
        several,
        classify,
        count,
        compare,
        point,
        listing,
    )
}


def canonical_phrase(phrases: Sequence[str], regions: Sequence[Region]) -> str:
    """The one of several right answers that is taught; an evaluation accepts them all.

    The same choice for the same region is easier to learn than a random one, and easier still is one that can be seen
    in the region itself: so the phrase with the fewest words that are not tags or category of `regions`; of several
    such without any foreign word the longest ("red star" before "star", which needs a look at all other stars), else
    the shortest; then the first in the alphabet.
    """
    own = own_words(regions)

    def rank(phrase: str) -> tuple[int, int, str]:
        words = phrase.split()
        foreign = sum(word not in own for word in words)
        return foreign, len(words) if foreign else -len(words), phrase

    return min(phrases, key=rank)


def own_words(regions: Sequence[Region]) -> set[str]:
    """The words of tags and category: what can be seen in the regions themselves."""
    return {word for region in regions for text in (*region.tags, region.category or "") for word in text.split()}


def reading_order(boxes: Sequence[Box]) -> list[int]:
    """Indices of the boxes from top to bottom by their upper edge, then from left to right."""
    return sorted(range(len(boxes)), key=lambda index: (boxes[index][1], boxes[index][0]))


def _comparisons(first: Region, second: Region) -> Iterator[tuple[str, str]]:
    areas = [(x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in (first.box_xyxy, second.box_xyxy)]
    if max(areas) >= LARGER_BY * min(areas):
        yield prompts.COMPARE_SIZE, prompts.FIRST if areas[0] > areas[1] else prompts.SECOND
    colors = [COLOR_WORDS.intersection(region.tags) for region in (first, second)]
    if all(len(color) == 1 for color in colors):
        yield prompts.COMPARE_COLOR, prompts.YES if colors[0] == colors[1] else prompts.NO
    yield prompts.COMPARE_KIND, prompts.YES if first.category == second.category else prompts.NO


def _locate(kind: str, phrase: str, record: Record, indices: Sequence[int]) -> Turn:
    boxes = [record.regions[index].box_xyxy for index in indices]
    answer = BoxList(tuple(boxes[position] for position in reading_order(boxes)))
    return Turn(kind, prompts.LOCATE.format(phrase=phrase), (answer,), regions=frozenset(indices))


def _about(kind: str, question: str, answer: str, record: Record, index: int) -> Turn:
    return Turn(kind, question, (answer,), (record.regions[index].box_xyxy,), frozenset((index,)))


def _unique_by_region(record: Record) -> dict[int, list[tuple[str, int]]]:
    """Region index -> its (phrase, index) pairs, for phrases that are true of this region alone."""
    groups: dict[int, list[tuple[str, int]]] = {}
    for phrase, index in unique_phrases(record):
        if is_plain(phrase):
            groups.setdefault(index, []).append((phrase, index))
    return groups


def is_plain(text: str) -> bool:
    """Not blank, and free of the markers that would break a conversation (`<image>` in a transcript, for example)."""
    return bool(text.strip()) and not any(marker in text for marker in SPECIAL_TOKENS)


def contains(box: Box, xy: tuple[float, float]) -> bool:
    x, y = xy
    return box[0] <= x <= box[2] and box[1] <= y <= box[3]


def _shuffled(items: Sequence[T], rng: random.Random) -> list[T]:
    return rng.sample(items, len(items))


def _shuffled_regions(record: Record, rng: random.Random) -> list[tuple[int, Region]]:
    return _shuffled(list(enumerate(record.regions)), rng)
