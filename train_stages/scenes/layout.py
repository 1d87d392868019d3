"""Where the objects of a scene stand: drawn one after the other, each kept only if every guarantee still holds."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from .presets import ScenePreset
from .sprites import IntBox, ObjectSpec, Sprite, draw_sprite, tight_box

TRIES = 40  # random places tried before an object is made smaller
SHRINK = 0.85
GAP_PX = 3  # least distance between the boxes of objects that do not overlap
LEAST_COVER = 0.04  # an overlap that covers less is a mere touch: another place is tried


@dataclass
class Placed:
    """An object in its place. `box` is the tight box of its visible part, `full_area` its pixels if nothing covered it,
    `area` its visible pixels."""

    spec: ObjectSpec
    sprite: Sprite
    left: int
    top: int
    box: IntBox
    full_area: int
    area: int

    @property
    def covered(self) -> float:
        """The part of the object that later objects cover, 0 to 1."""
        return 1 - self.area / self.full_area


def place_objects(
    rng: np.random.Generator, size: tuple[int, int], specs: Sequence[ObjectSpec], preset: ScenePreset
) -> tuple[list[Placed], np.ndarray] | None:
    """Find a place for every spec, in drawing order.

    Returns the objects and the label map, uint8 (height, width): 0 = background, i + 1 = object i is visible here. None
    when some object fits nowhere (the caller then draws other objects).
    """
    labels = np.zeros((size[1], size[0]), np.uint8, order="F")  # the order in which masks are encoded
    placed: list[Placed] = []
    for spec in specs:
        if not _place(rng, labels, placed, spec, preset):
            return None
    return placed, labels


def _place(
    rng: np.random.Generator, labels: np.ndarray, placed: list[Placed], spec: ObjectSpec, preset: ScenePreset
) -> bool:
    short = min(labels.shape)
    least, most = preset.side[0] * short, preset.side[1] * short
    hosts = [other for other in placed if other.spec.word is None and not other.covered]
    # A sign never covers anything: its plate would hide too much of a small glyph.
    wants_overlap = spec.word is None and hosts and rng.random() < preset.overlap_share
    host = hosts[rng.integers(len(hosts))] if wants_overlap else None
    for _ in range(4):
        sprite = draw_sprite(rng, spec)
        if max(sprite.size) > most:
            spec = replace(spec, side=spec.side * most / max(sprite.size) * 0.99)
            continue
        if min(sprite.size) < least:
            spec = replace(spec, side=spec.side * least / min(sprite.size) * 1.02)
            continue
        if host is not None and _overlap(rng, labels, placed, spec, sprite, host, preset):
            return True
        for _ in range(TRIES):
            left = int(rng.integers(0, labels.shape[1] - sprite.size[0] + 1))
            top = int(rng.integers(0, labels.shape[0] - sprite.size[1] + 1))
            if not any(_near(_box(sprite, left, top), other.box) for other in placed):
                _draw(labels, placed, spec, sprite, left, top)
                return True
        spec = replace(spec, side=spec.side * SHRINK)
    return False


def _overlap(
    rng: np.random.Generator,
    labels: np.ndarray,
    placed: list[Placed],
    spec: ObjectSpec,
    sprite: Sprite,
    host: Placed,
    preset: ScenePreset,
) -> bool:
    """Try to put the sprite over the rim of `host`, away from all others; False when no try keeps the guarantees."""
    height, width = labels.shape
    least = preset.side[0] * min(labels.shape)
    others = [other for other in placed if other is not host]
    for _ in range(TRIES // 2):
        left = int(rng.integers(host.box[0] - sprite.size[0] + 1, host.box[2]))
        top = int(rng.integers(host.box[1] - sprite.size[1] + 1, host.box[3]))
        box = _box(sprite, left, top)
        if left < 0 or top < 0 or box[2] > width or box[3] > height or any(_near(box, other.box) for other in others):
            continue
        x0, y0 = max(left, host.left), max(top, host.top)
        x1, y1 = min(box[2], host.left + host.sprite.size[0]), min(box[3], host.top + host.sprite.size[1])
        visible = host.sprite.mask.copy()
        covering = sprite.mask[y0 - top : y1 - top, x0 - left : x1 - left]
        visible[y0 - host.top : y1 - host.top, x0 - host.left : x1 - host.left] &= ~covering
        area = int(visible.sum())
        if not LEAST_COVER <= 1 - area / host.full_area <= preset.max_cover:
            continue
        seen = tight_box(visible)
        if min(seen[2] - seen[0], seen[3] - seen[1]) < least:
            continue
        host.area = area
        host.box = (host.left + seen[0], host.top + seen[1], host.left + seen[2], host.top + seen[3])
        _draw(labels, placed, spec, sprite, left, top)
        return True
    return False


def _box(sprite: Sprite, left: int, top: int) -> IntBox:
    return left, top, left + sprite.size[0], top + sprite.size[1]


def _near(first: IntBox, second: IntBox) -> bool:
    """True when two boxes overlap or are closer than `GAP_PX`."""
    return (
        first[0] < second[2] + GAP_PX
        and second[0] < first[2] + GAP_PX
        and first[1] < second[3] + GAP_PX
        and second[1] < first[3] + GAP_PX
    )


def _draw(labels: np.ndarray, placed: list[Placed], spec: ObjectSpec, sprite: Sprite, left: int, top: int) -> None:
    box = _box(sprite, left, top)
    area = int(sprite.mask.sum())
    labels[box[1] : box[3], box[0] : box[2]][sprite.mask] = len(placed) + 1
    placed.append(Placed(spec, sprite, left, top, box, area, area))
