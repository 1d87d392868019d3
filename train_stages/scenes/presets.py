"""How hard a scene is, as numbers. `default` is fixed; the others are easier and exist for a curriculum only."""

from dataclasses import dataclass

from .errors import user_error

EVAL_SEED_START = 1_000_000  # training scenes have seeds below this, evaluation scenes from here on


@dataclass(frozen=True)
class ScenePreset:
    """What the generator may draw. Lengths called `side` are fractions of the image's shorter side.

    Attributes:
        image_px: least and greatest width and height in pixels.
        max_aspect: greatest ratio of width to height, and of height to width.
        objects: least and greatest number of objects, signs included.
        signs: least and greatest number of word signs.
        side: hard limits on every side of every (visible) box.
        glyph_long_side: range from which the longer side of a glyph is drawn.
        sign_width: range from which the width of a sign's plate is drawn.
        photo_share: probability of a photograph as background.
        stuff_share: probability of a band of ground.
        distractor_share: probability of a second glyph of a category that is already in the scene.
        twin_share: probability that such a distractor also has the same colour.
        overlap_share: probability, for each glyph, to be put over an earlier glyph.
        max_cover: greatest part of a glyph's area that later objects may cover.
        max_angle: greatest rotation of a glyph in degrees (signs: a third of it).
    """

    name: str
    image_px: tuple[int, int] = (256, 448)
    max_aspect: float = 4 / 3
    objects: tuple[int, int] = (3, 7)
    signs: tuple[int, int] = (1, 2)
    side: tuple[float, float] = (0.10, 0.45)
    glyph_long_side: tuple[float, float] = (0.16, 0.42)
    sign_width: tuple[float, float] = (0.28, 0.43)
    photo_share: float = 0.9
    stuff_share: float = 0.3
    distractor_share: float = 0.75
    twin_share: float = 0.25
    overlap_share: float = 0.15
    max_cover: float = 0.25
    max_angle: float = 15.0


PRESETS: dict[str, ScenePreset] = {
    preset.name: preset
    for preset in (
        ScenePreset(name="default"),
        ScenePreset(
            name="easy",
            image_px=(256, 320),
            objects=(2, 3),
            signs=(0, 1),
            side=(0.15, 0.50),
            glyph_long_side=(0.28, 0.46),
            sign_width=(0.40, 0.48),
            photo_share=0.0,
            stuff_share=0.0,
            distractor_share=0.4,
            twin_share=0.0,
            overlap_share=0.0,
            max_cover=0.0,
            max_angle=8.0,
        ),
        ScenePreset(
            name="single",
            image_px=(256, 320),
            objects=(1, 1),
            signs=(0, 1),
            side=(0.15, 0.60),
            glyph_long_side=(0.35, 0.55),
            sign_width=(0.42, 0.58),
            photo_share=0.5,
            stuff_share=0.0,
            distractor_share=0.0,
            overlap_share=0.0,
            max_cover=0.0,
            max_angle=8.0,
        ),
    )
}


def scene_preset(name: str | ScenePreset) -> ScenePreset:
    """The preset called `name` (a preset is handed back as it is); raises UserError for an unknown name."""
    if isinstance(name, ScenePreset):
        return name
    if name not in PRESETS:
        raise user_error(f"There is no scene preset {name!r}: choose one of {', '.join(PRESETS)}.")
    return PRESETS[name]
