"""Pictures to begin with: generated scenes, which the packaged models are made for, and photographs."""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image

from ..mllm.prompts import LIST_ALL
from ..train_stages.images import open_image
from ..train_stages.records import Record
from ..train_stages.scenes import EVAL_SEED_START, SIGN, generate_scene
from ..train_stages.scenes.package_files import package_file
from .marks import Mark

# Never trained on; of the first 38, scenes on which `nano` answers most of the questions below (docs/nano.md has all).
SCENE_SEEDS = tuple(EVAL_SEED_START + number for number in (29, 9, 21, 14, 25, 4))
PHOTOS = (
    ("pagoda", "sklearn", "datasets/images/china.jpg", (95.0, 28.0, 365.0, 330.0)),
    ("coffee", "skimage", "data/coffee.png", (170.0, 14.0, 430.0, 320.0)),
    ("tabby", "skimage", "data/chelsea.png", (130.0, 62.0, 226.0, 148.0)),
    ("astronaut", "skimage", "data/astronaut.png", (160.0, 10.0, 300.0, 180.0)),
)


@dataclass(frozen=True)
class Example:
    """A picture with what is drawn on it and questions that fit; the first question is put into the box."""

    title: str
    image: Image.Image
    marks: tuple[Mark, ...]
    questions: tuple[str, ...]


def scene_examples() -> list[Example]:
    """Generated scenes, the same on every machine. The words in the questions are true of exactly one object."""
    examples = []
    for seed in SCENE_SEEDS:
        scene = generate_scene(seed)
        examples.append(_scene_example(f"scene {len(examples) + 1}", scene.image, scene.record))
    return examples


def photo_examples() -> list[Example]:
    """Photographs that dependencies ship. A model of scenes guesses on them; towers can be looked at with them."""
    questions = ("What is in [1]?", "Describe the image.")
    return [
        Example(title, open_image(package_file(package, file)), (Mark(1, box),), questions)
        for title, package, file, box in PHOTOS
    ]


def _scene_example(title: str, image: Image.Image, record: Record) -> Example:
    things = [region for region in record.regions if not region.stuff]
    glyph = next(thing for thing in things if thing.category != SIGN)
    signs = [thing for thing in things if thing.category == SIGN]
    marks = [Mark(1, glyph.box_xyxy)]
    questions = ["What is in [1]?"]
    if signs:
        marks.append(Mark(2, signs[0].box_xyxy, None, "sign"))
        questions.append("Read [2].")
    texts = [text for thing in things for text in thing.texts]
    alone = sorted({text for text in texts if texts.count(text) == 1}, key=lambda text: (len(text), text))
    questions += [f"Find {text}" for text in alone[:1]]
    shared = sorted({text for text in texts if texts.count(text) > 1}, key=lambda text: (len(text), text))
    questions += [f"Find {text}" for text in shared[:1]]
    questions += [f"Find {phrase}" for phrase in record.absent[:1]]
    return Example(title, image, tuple(marks), (*questions, LIST_ALL))
