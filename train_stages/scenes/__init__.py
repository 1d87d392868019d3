"""Scenes: generated pictures of glyphs and words over photographs; every box, mask, phrase and transcript is known."""

from .expressions import phrase_kind
from .generate import Scene, generate_scene
from .glyphs import CATEGORIES, COLORS, SIGN, plural
from .page import scene_page
from .presets import EVAL_SEED_START, PRESETS, ScenePreset
from .words import SEEN_WORDS, UNSEEN_WORDS
from .write import write_scenes

__all__ = [
    "CATEGORIES",
    "COLORS",
    "EVAL_SEED_START",
    "PRESETS",
    "SEEN_WORDS",
    "SIGN",
    "UNSEEN_WORDS",
    "Scene",
    "ScenePreset",
    "generate_scene",
    "phrase_kind",
    "plural",
    "scene_page",
    "write_scenes",
]
