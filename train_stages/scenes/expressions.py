"""The phrase grammar of scenes: every phrase that is true of an object, and phrases that are true of none.

    noun      = CATEGORY | COLOR CATEGORY                      star, red star, sign, blue sign
    word sign = [COLOR] sign "WORD"                            sign "apple", blue sign "apple"
    extreme   = leftmost|rightmost|topmost|bottommost noun     two or more of that noun are in the scene
    size      = largest|smallest noun                          two or more of that noun are in the scene
    relation  = noun (left of|right of|above|below) the ANCHOR ANCHOR = a noun or word sign that is unique here

Truth has three values, decided on the boxes of the visible parts: true, false, and *unclear* within the margins below.
A phrase whose truth is unclear for a single object that it could mean is not a phrase of the scene at all: it is
emitted for no object, and never as absent.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from .glyphs import CATEGORIES, COLORS, SIGN

EXTREME_MARGIN = 0.05  # least lead of the outermost centre over the next one, in shorter sides of the image
SIZE_RATIO = 1.35  # least ratio of the areas of the largest (smallest) box and the next one
RELATION_REACH = 0.12  # "left of" is true from this distance of the centres on (in shorter sides) ...
RELATION_SLOPE = 0.8  # ... when the offset across is at most this part of the distance along
RELATION_FALSE = 0.02  # up to this distance it is false; between the two it is unclear

# Direction -> axis (0 = x, 1 = y) and sign of the step from the anchor to the object.
EXTREMES = {"leftmost": (0, -1), "rightmost": (0, 1), "topmost": (1, -1), "bottommost": (1, 1)}
RELATIONS = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}
SIZES = {"largest": 1, "smallest": -1}


@dataclass(frozen=True)
class Thing:
    """What the grammar knows of an object. `box_xyxy` is in pixels; `word` is a sign's transcript."""

    box_xyxy: tuple[float, float, float, float]
    category: str
    color: str
    word: str | None = None

    @cached_property
    def center(self) -> tuple[float, float]:
        x0, y0, x1, y1 = self.box_xyxy
        return (x0 + x1) / 2, (y0 + y1) / 2

    @property
    def area(self) -> float:
        x0, y0, x1, y1 = self.box_xyxy
        return (x1 - x0) * (y1 - y0)

    @property
    def nouns(self) -> tuple[str, str]:
        return self.category, f"{self.color} {self.category}"

    @property
    def quotes(self) -> tuple[str, ...]:
        if self.word is None:
            return ()
        return f'sign "{self.word}"', f'{self.color} sign "{self.word}"'


def true_phrases(things: Sequence[Thing], short_side: float) -> dict[str, tuple[int, ...]]:
    """Every phrase of the grammar that is clearly true of something: phrase -> indices of all things it is true of.

    `short_side` is the image's shorter side in pixels, the unit of the margins.
    """
    nouns = _named(things, lambda thing: thing.nouns)
    quotes = _named(things, lambda thing: thing.quotes)
    phrases: dict[str, tuple[int, ...]] = {**nouns, **quotes}
    for noun, members in nouns.items():
        phrases.update((f"{word} {noun}", (index,)) for word, index in _superlatives(things, members, short_side))
    anchors = [(name, members[0]) for name, members in {**nouns, **quotes}.items() if len(members) == 1]
    # The colour of a quoted sign adds nothing as an anchor.
    anchors = [(name, index) for name, index in anchors if '"' not in name or name.startswith(SIGN)]
    for relation in RELATIONS:
        for name, anchor in anchors:
            verdicts = [holds(relation, thing, things[anchor], short_side) for thing in things]
            for noun, members in nouns.items():
                answers = {i: verdicts[i] for i in members if i != anchor}
                related = tuple(i for i, verdict in answers.items() if verdict)
                if related and None not in answers.values():
                    phrases[f"{noun} {relation} the {name}"] = related
    return phrases


def phrase_kind(phrase: str) -> str:
    """Which rule of the grammar made `phrase`: "noun", "sign" (a quoted word), "extreme", "size" or "relation"."""
    if any(f" {relation} the " in phrase for relation in RELATIONS):
        return "relation"
    first = phrase.split(" ", 1)[0]
    if first in EXTREMES or first in SIZES:
        return "extreme" if first in EXTREMES else "size"
    return "sign" if '"' in phrase else "noun"


def _named(things: Sequence[Thing], names: Callable[[Thing], tuple[str, ...]]) -> dict[str, tuple[int, ...]]:
    """Name -> indices of the things that bear it, in order."""
    result: dict[str, tuple[int, ...]] = {}
    for index, thing in enumerate(things):
        for name in names(thing):
            result[name] = (*result.get(name, ()), index)
    return result


def _superlatives(things: Sequence[Thing], members: tuple[int, ...], short_side: float) -> Iterator[tuple[str, int]]:
    """(superlative, index of the one member it is clearly true of); nothing for a noun that has one member only."""
    if len(members) < 2:
        return
    for word, (axis, sign) in EXTREMES.items():
        first, second = sorted(members, key=lambda i: -sign * things[i].center[axis])[:2]
        if sign * (things[first].center[axis] - things[second].center[axis]) >= EXTREME_MARGIN * short_side:
            yield word, first
    for word, sign in SIZES.items():
        first, second = sorted(members, key=lambda i: -sign * things[i].area)[:2]
        if (things[first].area / things[second].area) ** sign >= SIZE_RATIO:
            yield word, first


def holds(relation: str, thing: Thing, anchor: Thing, short_side: float) -> bool | None:
    """Whether `thing` is `relation` ("left of", ...) `anchor`; None when that is unclear."""
    axis, sign = RELATIONS[relation]
    along = sign * (thing.center[axis] - anchor.center[axis]) / short_side
    across = abs(thing.center[1 - axis] - anchor.center[1 - axis]) / short_side
    if along <= RELATION_FALSE:
        return False
    return True if along >= RELATION_REACH and across <= RELATION_SLOPE * along else None


def absent_phrases(
    rng: np.random.Generator,
    things: Sequence[Thing],
    words: Sequence[str],
    shown: Sequence[str] = (),
    count: tuple[int, int] = (3, 6),
) -> list[str]:
    """Some phrases of the grammar that are true of nothing in the scene, hard ones first of all.

    Half are a category of the scene in a colour that it does not have here; the others a category that is not here
    (alone or with a colour), or, where a sign stands, a sign with another of `words`. Categories in `shown` (which the
    background really shows) are never called absent.
    """
    nouns = {noun for thing in things for noun in thing.nouns}
    present = sorted({thing.category for thing in things})
    recolored = [f"{color} {category}" for category in present for color in COLORS]
    missing = [category for category in CATEGORIES if category not in present and category not in shown]
    shown_words = {thing.word for thing in things}
    signs = shown_words - {None}
    kinds = [_absent_color, _absent_category, _absent_word]
    chances = np.array([0.5, 0.3, 0.2 if signs else 0.0])
    result: list[str] = []
    pools = (
        [phrase for phrase in recolored if phrase not in nouns],
        missing,
        [word for word in words if word not in shown_words],
    )
    goal = int(rng.integers(count[0], count[1] + 1))
    while len(result) < goal:
        kind = int(rng.choice(3, p=chances / chances.sum()))
        phrase = kinds[kind](rng, pools[kind])
        if phrase not in result:
            result.append(phrase)
    return result


def _absent_color(rng: np.random.Generator, pool: list[str]) -> str:
    return pool[rng.integers(len(pool))]


def _absent_category(rng: np.random.Generator, pool: list[str]) -> str:
    category = pool[rng.integers(len(pool))]
    return category if rng.random() < 0.5 else f"{tuple(COLORS)[rng.integers(len(COLORS))]} {category}"


def _absent_word(rng: np.random.Generator, pool: list[str]) -> str:
    return f'{SIGN} "{pool[rng.integers(len(pool))]}"'
