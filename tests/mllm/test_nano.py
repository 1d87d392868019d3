"""The models that come with the package: there, small, and able to answer."""

import json
import re

import pytest
import torch
from safetensors import safe_open

from regiontower.mllm import Question, answer_questions, load_mllm
from regiontower.mllm.boxes import Boxes
from regiontower.mllm.prompts import LOCATE, REFER
from regiontower.train_stages.phrases import unique_phrases
from regiontower.train_stages.scenes import EVAL_SEED_START, generate_scene
from regiontower.vision_towers import RiceVisionModel, describe_tower, load_tower
from regiontower.vision_towers.packaged import WEIGHTS_FOLDER, packaged_models

MEGABYTE = 1_000_000
SCENES = range(EVAL_SEED_START + 900, EVAL_SEED_START + 912)


@pytest.fixture(scope="module")
def nano():
    return load_mllm("nano", device="cpu", dtype="fp32")


def test_all_three_are_there_and_small():
    assert packaged_models() == ("nano", "nano-clip", "nano-lm")
    sizes = {f.name: sum(file.stat().st_size for file in f.rglob("*")) for f in WEIGHTS_FOLDER.iterdir() if f.is_dir()}
    assert max(sizes.values()) <= 16 * MEGABYTE and sum(sizes.values()) <= 32 * MEGABYTE


@pytest.mark.parametrize("name", ["nano", "nano-clip", "nano-lm"])
def test_each_says_what_it_is(name):
    folder = WEIGHTS_FOLDER / name
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert {file.get_slice(key).get_dtype() for key in file.keys()} == {"BF16"}  # noqa: SIM118 - no dict
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "license: apache-2.0" in card and "regiontower bench nano-build" in card and "## Limits" in card
    stage = json.loads((folder / "stage.json").read_text(encoding="utf-8"))
    assert stage["status"] == "finished"
    texts = [
        card,
        *(path.read_text(encoding="utf-8") for path in folder.glob("*.json") if path.name != "tokenizer.json"),
    ]
    assert not any(re.search(r"/(home|opt|work|root|tmp)/", text) for text in texts)  # no path of the machine


def test_the_towers_are_of_one_kind_and_trained_differently():
    rice, clip = load_tower("nano"), load_tower("nano-clip")
    assert isinstance(rice, RiceVisionModel) and describe_tower(rice.config) == describe_tower(clip.config)
    assert any(not torch.equal(a, b) for a, b in zip(rice.parameters(), clip.parameters(), strict=True))


def test_nano_names_what_is_in_a_box_and_finds_it_again(nano):
    model, processor = nano
    named = found = 0
    scenes = [generate_scene(seed) for seed in SCENES]
    things = [(scene, region) for scene in scenes for region in scene.record.regions if not region.stuff]
    answers = answer_questions(
        model, processor, [Question(scene.image, REFER, [region.box_xyxy]) for scene, region in things]
    )
    for (_, region), answer in zip(things, answers, strict=True):
        named += (region.category or "") in answer.text

    phrases = [(scene, phrase, index) for scene in scenes for phrase, index in unique_phrases(scene.record)][::4]
    questions = [Question(scene.image, LOCATE.format(phrase=phrase), []) for scene, phrase, _ in phrases]
    for (scene, _, index), answer in zip(phrases, answer_questions(model, processor, questions), strict=True):
        first = answer.boxes.boxes[:1]
        found += bool(len(first)) and float(first.iou(Boxes([scene.record.regions[index].box_xyxy]))[0, 0]) >= 0.5
    # Well under what it can do, and well over what a model that sees nothing could.
    assert len(things) >= 40 and named >= 0.6 * len(things)
    assert len(phrases) >= 100 and found >= 0.45 * len(phrases)
