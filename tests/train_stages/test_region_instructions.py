"""Region records written down as instruction data: every line is true of its record, in both layouts."""

from __future__ import annotations

import json
import re

import pytest
from typer.testing import CliRunner

from regiontower.cli import app
from regiontower.mllm import prompts
from regiontower.mllm.boxes import Boxes, ImageFrame, box_format
from regiontower.mllm.prompts import REGION_TOKEN
from regiontower.train_stages.importers.llava import read_llava_conversations
from regiontower.train_stages.phrases import normalise_phrase
from regiontower.train_stages.question_wordings import WORDINGS
from regiontower.train_stages.record_io import read_records
from regiontower.train_stages.region_instructions import REGION_MIX, reworded, write_instructions
from regiontower.train_stages.scenes import write_scenes
from regiontower.vision_towers.errors import UserError


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    return read_records(write_scenes(tmp_path_factory.mktemp("scenes"), 24, 0, progress=False))


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_all_seven_kinds_are_written(records, tmp_path):
    found = write_instructions(records, tmp_path / "data.jsonl", per_image=4, turns=8, progress=False)
    assert set(found.kinds) == set(REGION_MIX) and all(found.kinds.values()), found.kinds
    assert found.conversations == len(lines(found.path)) == 4 * 24 and found.without == 0
    again = write_instructions(records, tmp_path / "again.jsonl", per_image=4, turns=8, progress=False)
    assert again.path.read_bytes() == found.path.read_bytes()
    other = write_instructions(records, tmp_path / "other.jsonl", per_image=4, turns=8, seed=1, progress=False)
    assert other.path.read_bytes() != found.path.read_bytes()


def test_swift_boxes_stand_in_the_order_of_their_places_and_are_the_records(records, tmp_path):
    by_image = {str(records.image_path(record).resolve()): record for record in records.records}
    path = write_instructions(records, tmp_path / "data.jsonl", turns=8, wordings=False, progress=False).path
    checked = 0
    for row in lines(path):
        record = by_image[row["images"][0]]
        real = {tuple(region.box_xyxy): region for region in record.regions}
        boxes = iter(tuple(box) for box in row["objects"]["bbox"])
        assert row["objects"]["bbox_type"] == "real"
        text = "".join(message["content"] for message in row["messages"])
        assert text.count("<bbox>") == len(row["objects"]["bbox"]) and REGION_TOKEN not in text
        assert row["messages"][0]["content"].startswith("<image>") and text.count("<image>") == 1
        for asked, answered in zip(row["messages"][::2], row["messages"][1::2], strict=True):
            question, answer = asked["content"].removeprefix("<image>"), answered["content"]
            given = [next(boxes) for _ in range(question.count("<bbox>") + answer.count("<bbox>"))]
            assert all(box in real for box in given)
            if match := re.fullmatch(r"Where is (.+)\?", question):
                phrase = normalise_phrase(match[1])
                if answer == prompts.NO_BOX:
                    assert phrase in {normalise_phrase(text) for text in record.absent}
                else:
                    fitting = {
                        box for box, region in real.items() if phrase in {normalise_phrase(t) for t in region.texts}
                    }
                    assert set(given) == fitting
            elif question == prompts.READ.replace(REGION_TOKEN, "<bbox>"):
                assert answer == real[given[0]].ocr
            elif question == prompts.COMPARE_SIZE.replace(REGION_TOKEN, "<bbox>"):
                first, second = ((x2 - x1) * (y2 - y1) for x1, y1, x2, y2 in given)
                assert answer == (prompts.FIRST if first > second else prompts.SECOND)
            else:
                continue
            checked += 1
    assert checked > 24


def test_llava_lines_are_read_back_and_their_boxes_are_the_records(records, tmp_path):
    path = write_instructions(
        records, tmp_path / "data.jsonl", layout="llava", mix={"grounding": 1}, wordings=False, progress=False
    ).path
    found = read_llava_conversations(path, check_images=True)
    assert len(found) == 24 and not found.bad
    by_image = {records.image_path(record).resolve(): record for record in records.records}
    convention = box_format("norm01")
    for sample in found:
        record = by_image[sample.image]
        frame = ImageFrame.identity((record.width, record.height))
        for (_, question), (_, answer) in zip(sample.turns[::2], sample.turns[1::2], strict=True):
            phrase = re.search(r"Where is (.+)\?", question)[1]
            parsed = convention.parse(answer, frame)
            assert parsed.status == "boxes" and len(parsed.boxes) == 1
            overlaps = Boxes([region.box_xyxy for region in record.regions]).iou(parsed.boxes)[:, 0]
            best = record.regions[int(overlaps.argmax())]
            assert overlaps.max() > 0.8 and normalise_phrase(phrase) in map(normalise_phrase, best.texts)


def test_wordings_hold_the_fields_of_their_prompt():
    for prompt, wordings in WORDINGS.items():
        assert wordings[0] == prompt and len(set(wordings)) == len(wordings) > 1
        for wording in wordings:
            assert wording.count(REGION_TOKEN) == prompt.count(REGION_TOKEN)
            assert re.findall(r"\{\w+\}", wording) == re.findall(r"\{\w+\}", prompt)


def test_a_reworded_question_keeps_its_phrase(records):
    import random

    from regiontower.train_stages.conversations import sample_conversation

    seen = set()
    for seed in range(40):
        rng = random.Random(seed)
        for turn in sample_conversation(records.records[seed % 24], rng, {"grounding": 1, "several": 1}, 4):
            other = reworded(turn, rng)
            phrase = turn.question.removeprefix("Where is ").removesuffix("?")
            assert phrase in other.question and other.answer == turn.answer and "{" not in other.question
            seen.add(other.question.replace(phrase, "{phrase}"))
    assert seen == set(WORDINGS[prompts.LOCATE])


def test_the_command_and_what_it_refuses(records, tmp_path):
    out = tmp_path / "deep" / "data.jsonl"
    done = CliRunner().invoke(app, ["instructions", str(records.path), "--out", str(out), "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout.splitlines()[-1])["conversations"] == len(lines(out)) == 24
    with pytest.raises(UserError, match="layout must be swift or llava; got 'coco'"):
        write_instructions(records, tmp_path / "x.jsonl", layout="coco")
    bare = records.records[0].model_copy(update={"regions": [], "absent": [], "captions": [], "points": []})
    empty = type(records)(records.path, records.root, [bare], [])
    with pytest.raises(UserError, match=r"no record of .* gives a question"):
        write_instructions(empty, tmp_path / "x.jsonl", progress=False)
    assert not list(tmp_path.glob("*x.jsonl*"))
