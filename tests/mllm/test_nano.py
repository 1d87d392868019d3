"""The models that come with the package: there, small, and able to answer."""

import itertools
import json
import random
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from regiontower.benchmarks.nano_cards import FIGURES
from regiontower.mllm import ChatSession, Question, answer_questions, load_mllm
from regiontower.mllm.boxes import Boxes, box_format
from regiontower.mllm.prompts import COMPARE_SIZE, FIRST, LOCATE, NO, NO_BOX, REFER, SECOND, YES
from regiontower.train_stages.conversation_kinds import KINDS
from regiontower.train_stages.conversations import render_turns
from regiontower.train_stages.phrases import unique_phrases
from regiontower.train_stages.scenes import CATEGORIES, EVAL_SEED_START, SEEN_WORDS, SIGN, generate_scene
from regiontower.vision_towers import RiceVisionModel, describe_tower, load_tower
from regiontower.vision_towers.packaged import WEIGHTS_FOLDER, packaged_models

MEGABYTE = 1_000_000
SCENES = range(EVAL_SEED_START + 900, EVAL_SEED_START + 912)
NAMES = {*CATEGORIES, SIGN, "grass", "gravel", "brick", "sand"}
REPOSITORY = Path(__file__).resolve().parents[2]
RESULTS = REPOSITORY / "benchmarks" / "results"


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


def is_well_formed(kind, question, answer):
    """Whether the answer has the form of answers to this kind of question, right or wrong."""
    text, boxes = answer.text, answer.boxes
    if kind in ("grounding", "named", "several", "absent"):
        return text == NO_BOX or (boxes.status == "boxes" and bool((boxes.boxes.area > 0).all()))
    if kind == "listing":
        labels = {label.strip() for label in re.split(r"(?:\[[\d,]*\] ?)+", text)} - {""}
        return boxes.status == "boxes" and bool(labels) and labels <= NAMES
    named = any(re.search(rf"\b{name}s?\b", text) for name in NAMES)
    return {
        "referring": named and boxes.status == "none",
        "point": named and boxes.status == "none",
        "region_caption": named and (text.startswith(("a ", "an ")) or text.endswith(" along the bottom")),
        "image_caption": named and text[:1].isupper() and text.endswith("."),
        "reading": text in SEEN_WORDS,
        "classify": text in NAMES,
        "count": text.isdecimal(),
        "compare": text in ((FIRST, SECOND) if question == COMPARE_SIZE else (YES, NO)),
    }[kind]


def test_an_answer_to_every_kind_of_question_has_its_form(nano):
    model, processor = nano
    spoken, asked = box_format(processor.box_format), []
    for scene in map(generate_scene, SCENES[:4]):
        for kind, turns in KINDS.items():
            drawn = list(itertools.islice(turns(scene.record, random.Random(0)), 1))
            asked += [(kind, scene, turn) for turn in render_turns(drawn, spoken, processor.frame(scene.image.size))]
    questions = [Question(scene.image, turn.question, turn.boxes) for _, scene, turn in asked]
    answers = answer_questions(model, processor, questions, max_new_tokens=80)
    formed = {kind: [] for kind in KINDS}
    for (kind, _, turn), answer in zip(asked, answers, strict=True):
        formed[kind].append(is_well_formed(kind, turn.question, answer))
    assert all(len(rows) >= 2 for rows in formed.values())
    # Lists are what it is worst at: once in a while one loses its first bracket.
    assert sum(formed["listing"]) >= 0.6 * len(formed["listing"])
    assert {kind: all(rows) for kind, rows in formed.items() if kind != "listing"} == dict.fromkeys(
        set(KINDS) - {"listing"}, True
    )


def test_a_later_question_about_another_region_is_answered_as_if_it_were_the_first(nano):
    model, processor = nano
    later, alone = [], []
    for scene in map(generate_scene, SCENES[:3]):
        boxes = [region.box_xyxy for region in scene.record.regions if not region.stuff][:3]
        chat = ChatSession(model, processor, scene.image)
        later += [chat.ask(REFER, [box]).text for box in boxes]
        alone += [
            answer.text
            for answer in answer_questions(model, processor, [Question(scene.image, REFER, [box]) for box in boxes])
        ]
    assert later == alone and len(set(alone)) >= 6


def tables(path):
    """The tables of a Markdown file, each as rows of cells, the first of them the column names."""
    lines = path.read_text(encoding="utf-8").splitlines()
    for is_table, block in itertools.groupby(lines, lambda line: line.startswith("|")):
        if is_table:
            rows = [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in block]
            yield [rows[0], *rows[2:]]


def shown(figures, metric):
    """As documents write a figure: per cent, and the interval in brackets."""
    value, (low, high) = figures[metric], figures["ci95"][metric]
    return f"{100 * value:.1f} ({100 * low:.1f}-{100 * high:.1f})"


def test_the_table_of_the_quickstart_is_its_committed_run():
    results = json.loads((RESULTS / "quickstart.json").read_text(encoding="utf-8"))
    models = {"nano": "nano", "control": "control", "trained": "trained_now"}  # first word of a row -> model
    assert all(results[model]["n"] >= 300 for model in models.values()) and results["seconds"] <= 900
    metrics = {"acc": ("grounding", "acc50"), "IoU": ("grounding", "miou"), "referring": ("referring", "em")}
    metrics |= {"reading": ("reading", "em"), "absent": ("absent", "rejection")}
    names, *rows = next(table for table in tables(REPOSITORY / "README.md") if table[1][0].startswith("nano"))
    seen = set()
    for label, *cells in rows:
        for name, cell in zip(names[1:], cells, strict=True):
            model, words = models.get(label.split()[0]), [word for word in metrics if word in name]
            if model and words:
                task, metric = metrics[words[0]]
                assert cell == shown(results["tasks"][model][f"regiontower_{task}"], metric), (label, name)
                seen.add((model, words[0]))
    assert seen >= set(itertools.product(models.values(), ("acc", "IoU", "referring", "reading")))


def test_the_figures_of_the_page_about_nano_are_those_of_its_committed_run():
    results = json.loads((RESULTS / "nano.json").read_text(encoding="utf-8"))["models"]
    metrics = {label: (task, metric) for label, task, metric in FIGURES}
    heads = {"kinds of thing": "region_top1", "which word": "text_top1", "where a thing": "located_acc50"}
    names, *rows = next(table for table in tables(REPOSITORY / "docs" / "nano.md") if table[1][0] in metrics)
    models = [next((name for name in re.findall(r"`([^`]+)`", cell) if name in results), None) for cell in names]
    seen = set()
    for label, *cells in rows:
        head = next((key for words, key in heads.items() if words in label), None)
        if head and "value" in label:  # another way to read regions out
            head = f"value_{head}"
        for model, cell in zip(models[1:], cells, strict=True):
            if model and label in metrics:
                task, metric = metrics[label]
                assert cell == shown(results[model][task], metric), (label, model)
                seen.add((model, label))
            elif model and head:
                assert cell == f"{100 * results[model]['ceiling'][head]:.1f}", (label, model)
    assert seen >= set(itertools.product(("nano", "nano-clip"), metrics))
