"""One scene from one seed: background, objects, and the record of everything that is true of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from ..masks import encode_mask
from ..records import Record
from .backgrounds import Background, draw_background, draw_ground
from .captions import describe_scene, describe_thing
from .errors import user_error
from .expressions import Thing, absent_phrases, true_phrases
from .glyphs import CATEGORIES, COLORS, SIGN, SIGN_FONTS
from .layout import Placed, place_objects
from .presets import EVAL_SEED_START, ScenePreset, scene_preset
from .sprites import ObjectSpec, tight_box
from .words import word_list

POINT_DEPTH = 4  # pixels between a labelled point and the rim of its object
MAX_DRAWS = 200  # sets of objects drawn before giving up; a handful is usual


@dataclass(frozen=True)
class Scene:
    """A generated scene.

    image: RGB. record: everything known of it; objects come first in `regions`, in drawing order, a band of ground
    last. covered: for each region, the part of it that later objects cover (0 for the ground).
    """

    image: Image.Image
    record: Record
    covered: tuple[float, ...]


def image_name(seed: int) -> str:
    """Where the picture of scene `seed` lies, relative to the folder of its records."""
    return f"images/{seed:07d}.jpg"


def generate_scene(seed: int, preset: str | ScenePreset = "default", words: str = "seen") -> Scene:
    """Draw the scene of `seed` (any whole number >= 0): equal arguments give an equal scene, in any process.

    `words`: "seen" or "unseen", the list that signs (and absent signs) are drawn from. Raises UserError for an unknown
    preset or list, or a negative seed.
    """
    rules, vocabulary = scene_preset(preset), word_list(words)
    if seed < 0:
        raise user_error(f"The seed of a scene is a whole number >= 0, not {seed}.")
    rng = np.random.default_rng(seed)
    size = _draw_size(rng, rules)
    background = draw_background(rng, size, rules.photo_share)
    ground = draw_ground(rng, background) if rng.random() < rules.stuff_share else None
    placed, labels = _draw_objects(rng, size, rules, vocabulary, background.shows)
    for item in placed:
        item.sprite.paste_on(background.image, item.left, item.top)
    things = [Thing(item.box, item.spec.category, item.spec.color, item.spec.word) for item in placed]
    phrases = true_phrases(things, min(size))
    regions = [_region(i, thing, labels, phrases) for i, thing in enumerate(things)]
    if ground is not None:
        regions.append(_ground_region(ground[0], ground[1] & (labels == 0)))
    place = background.name if ground is None else f"{background.name} and {ground[0]}"
    # Plain dicts all the way down: pydantic would check a model again in each model that it stands in.
    fields = dict(
        image=image_name(seed),
        width=size[0],
        height=size[1],
        split="train" if seed < EVAL_SEED_START else "eval",
        captions=describe_scene(rng, things, place),
        tags=_image_tags(background, ground),
        absent=absent_phrases(rng, things, vocabulary, background.shows),
        points=_points(rng, labels, phrases),
        regions=regions,
    )
    record = Record.model_validate(fields)
    return Scene(background.image, record, (*(item.covered for item in placed), *(0.0,) * (ground is not None)))


def _draw_size(rng: np.random.Generator, rules: ScenePreset) -> tuple[int, int]:
    least, most = rules.image_px
    width = int(rng.integers(least, most + 1))
    low, high = np.ceil(width / rules.max_aspect), np.floor(width * rules.max_aspect)
    return width, int(rng.integers(max(least, int(low)), min(most, int(high)) + 1))


def _draw_objects(
    rng: np.random.Generator, size: tuple[int, int], rules: ScenePreset, words: tuple[str, ...], shown: Sequence[str]
) -> tuple[list[Placed], np.ndarray]:
    """Draw objects and places until all fit. The number of objects is drawn once, so that crowded scenes stay."""
    number = int(rng.integers(rules.objects[0], rules.objects[1] + 1))
    for _ in range(MAX_DRAWS):
        specs = _draw_specs(rng, min(size), rules, number, words, shown)
        found = place_objects(rng, size, specs, rules)
        if found is not None:
            return found
    raise RuntimeError(f"no place for {number} objects in {size[0]} x {size[1]} px with preset {rules.name!r}")


def _draw_specs(
    rng: np.random.Generator, short: int, rules: ScenePreset, number: int, words: tuple[str, ...], shown: Sequence[str]
) -> list[ObjectSpec]:
    """What to draw, in drawing order: signs first or in between, glyphs around them."""
    signs = min(int(rng.integers(rules.signs[0], rules.signs[1] + 1)), number)
    glyphs = number - signs
    categories = [category for category in CATEGORIES if category not in shown]
    kinds = [(categories[i], _color(rng)) for i in rng.choice(len(categories), glyphs, replace=False)]
    if glyphs >= 2 and rng.random() < rules.distractor_share:
        category, color = kinds[0]
        if rng.random() >= rules.twin_share:
            color = _color(rng, other_than=color)
        kinds[1] = (category, color)
    # Crowded scenes hold smaller glyphs, or they would not fit.
    low, high = rules.glyph_long_side
    high = max(low, high * min(1.0, 1.15 - 0.06 * number))
    specs = [
        ObjectSpec(category, color, rng.uniform(low, high) * short, rng.uniform(-rules.max_angle, rules.max_angle))
        for category, color in kinds
    ]
    for i in rng.choice(len(words), signs, replace=False).tolist():
        width = rng.uniform(*rules.sign_width) * short
        angle = rng.uniform(-rules.max_angle, rules.max_angle) / 3
        font = SIGN_FONTS[rng.integers(len(SIGN_FONTS))]
        specs.append(ObjectSpec(SIGN, _color(rng), width, angle, words[i], font))
    return [specs[i] for i in rng.permutation(len(specs))]


def _color(rng: np.random.Generator, other_than: str | None = None) -> str:
    choices = [color for color in COLORS if color != other_than]
    return choices[rng.integers(len(choices))]


def _region(index: int, thing: Thing, labels: np.ndarray, phrases: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    height, width = labels.shape
    return dict(
        box_xyxy=thing.box_xyxy,
        category=thing.category,
        texts=[phrase for phrase, members in phrases.items() if index in members],
        captions=describe_thing(thing, (width, height)),
        tags=[thing.category, thing.color],
        ocr=thing.word,
        mask=encode_mask(labels == index + 1),
    )


def _ground_region(category: str, mask: np.ndarray) -> dict[str, Any]:
    return dict(
        box_xyxy=tight_box(mask),
        category=category,
        stuff=True,
        captions=[f"{category} along the bottom"],
        tags=[category, "ground"],
        mask=encode_mask(mask),
    )


def _image_tags(background: Background, ground: tuple[str, np.ndarray] | None) -> list[str]:
    return [*background.tags, *([ground[0], "ground"] if ground is not None else [])]


def _points(rng: np.random.Generator, labels: np.ndarray, phrases: dict[str, tuple[int, ...]]) -> list[dict[str, Any]]:
    """One or two points well inside visible masks, with the phrases that are true of that object alone."""
    unique: dict[int, list[str]] = {}
    for phrase, members in phrases.items():
        if len(members) == 1:
            unique.setdefault(members[0], []).append(phrase)
    owners = sorted(unique)
    wanted = min(int(rng.integers(1, 3)), len(owners))
    points = []
    for owner in rng.permutation(owners)[:wanted]:
        y, x = _inner_pixel(rng, labels == owner + 1)
        points.append(dict(xy=(x + 0.5, y + 0.5), texts=unique[int(owner)]))
    return points


def _inner_pixel(rng: np.random.Generator, mask: np.ndarray) -> tuple[int, int]:
    """A random pixel (y, x) of the mask that lies `POINT_DEPTH` pixels inside it, or as deep as there is any."""
    left, top, right, bottom = tight_box(mask)
    core = np.pad(mask[top:bottom, left:right], 1)
    for _ in range(POINT_DEPTH):
        inner = np.zeros_like(core)
        inner[1:-1, 1:-1] = core[1:-1, 1:-1] & core[:-2, 1:-1] & core[2:, 1:-1] & core[1:-1, :-2] & core[1:-1, 2:]
        if not inner.any():
            break
        core = inner
    y, x = core.nonzero()
    choice = int(rng.integers(len(y)))
    return int(y[choice]) - 1 + top, int(x[choice]) - 1 + left
