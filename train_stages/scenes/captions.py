"""Sentences about a scene and its objects. They describe; they need not single anything out."""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from .expressions import Thing
from .glyphs import plural

NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven")

SCENE_TEMPLATES = (
    "{things} on {place}.",
    "A picture of {things} on {place}.",
    "On {place} there are {things}.",
    "{place} with {things}.",
)


def rough_place(box_xyxy: Sequence[float], size: tuple[int, int]) -> str:
    """Which ninth of the image (width, height) holds the box's centre: "top left", "left", "center", ..."""
    column = _third((box_xyxy[0] + box_xyxy[2]) / 2 / size[0], ("left", "", "right"))
    row = _third((box_xyxy[1] + box_xyxy[3]) / 2 / size[1], ("top", "", "bottom"))
    return f"{row} {column}".strip() or "center"


def _somewhere(place: str) -> str:
    """A rough place as an adverb: "at the top", "on the left", "in the bottom left"."""
    prepositions = {"top": "at", "bottom": "at", "left": "on", "right": "on"}
    return f"{prepositions.get(place, 'in')} the {place}"


def _third(fraction: float, names: tuple[str, str, str]) -> str:
    return names[min(2, int(fraction * 3))]


def describe_thing(thing: Thing, size: tuple[int, int]) -> list[str]:
    """Captions of one object: what it is, and where; a sign's transcript is always in them."""
    what = _group(thing.color, thing.category, thing.word, 1)
    return [what, f"{what} {_somewhere(rough_place(thing.box_xyxy, size))}"]


def describe_scene(rng: np.random.Generator, things: Sequence[Thing], place: str, count: int = 2) -> list[str]:
    """`count` captions of the whole scene, the objects in a new order in each and equal ones counted; `place` names the
    background."""
    order = rng.permutation(len(SCENE_TEMPLATES))[:count]
    return [_describe_once(rng, things, place, SCENE_TEMPLATES[i]) for i in order]


def _describe_once(rng: np.random.Generator, things: Sequence[Thing], place: str, template: str) -> str:
    groups = Counter((thing.color, thing.category, thing.word) for thing in things)
    keys = sorted(groups, key=str)
    chosen = [keys[i] for i in rng.permutation(len(keys))]
    parts = [_group(color, category, word, groups[color, category, word]) for color, category, word in chosen]
    listed = parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
    sentence = template.format(things=listed, place=place)
    return sentence[0].upper() + sentence[1:]


def _group(color: str, category: str, word: str | None, number: int) -> str:
    """`number` equal objects in words: "a red star", "two red stars", "red scissors" (a word without a singular)."""
    if word is not None:
        return f'a {color} {category} that says "{word}"'
    if number > 1:
        return f"{NUMBERS[number]} {color} {plural(category)}"
    return f"{color} {category}" if plural(category) == category else f"a {color} {category}"
