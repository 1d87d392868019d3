"""How turns are drawn into a conversation, and rendering keeps what they say."""

import random

import pytest
from conversation_records import boxes_of, desk, every_record, receipt

from regiontower.mllm.boxes import BOX_FORMATS, ImageFrame, box_format
from regiontower.train_stages.conversation_kinds import KINDS
from regiontower.train_stages.conversations import (
    DEFAULT_MIX,
    RenderedTurn,
    corpus_texts,
    describe_scene,
    render_turns,
    sample_conversation,
    text_messages,
)
from regiontower.train_stages.records import Record, Region
from regiontower.train_stages.scenes import generate_scene
from regiontower.vision_towers.errors import UserError

INT1000 = box_format("int1000")


def bare() -> Record:
    return Record(image="bare.png", width=10, height=10)


@pytest.fixture(scope="module")
def records() -> list[Record]:
    return every_record()


def test_turns_without_a_region_do_not_gather_at_the_end():
    early = late = 0
    for seed in range(300):
        turns = sample_conversation(
            generate_scene(seed % 10).record, random.Random(seed), {"grounding": 9, "absent": 1}, 6
        )
        early += sum(turn.kind == "absent" for turn in turns[:3])
        late += sum(turn.kind == "absent" for turn in turns[3:])
    assert early > 100 and abs(early - late) < 0.2 * (early + late)


def test_conversations_do_not_give_answers_away(records):
    for record in records:
        for seed in range(20):
            turns = sample_conversation(record, random.Random(seed), turns=8)
            asked = [index for turn in turns if turn.kind != "listing" for index in turn.regions]
            assert len(asked) == len(set(asked))
            assert [turn.kind for turn in turns].count("listing") <= 1
            assert all(turn.kind != "listing" for turn in turns[:-1])
            assert len(turns) <= 8 and len(set(turns)) == len(turns)


def test_conversations_follow_seed_mix_and_length():
    record = receipt()
    assert sample_conversation(record, random.Random(3)) == sample_conversation(record, random.Random(3))
    assert sample_conversation(record, random.Random(3)) != sample_conversation(record, random.Random(4))
    turns = sample_conversation(record, random.Random(0), {"reading": 3.0, "grounding": 1.0, "absent": 0.0}, turns=40)
    assert len(turns) == 40
    assert 22 <= sum(turn.kind == "reading" for turn in turns) <= 38
    assert {turn.kind for turn in turns} == {"reading", "grounding"}
    assert sample_conversation(bare(), random.Random(0)) == []
    assert set(DEFAULT_MIX) == set(KINDS) - {"named"}  # a part of what grounding asks


@pytest.mark.parametrize(
    ("mix", "match"),
    [({"grounded": 1.0}, "grounded"), ({"reading": -1.0}, "not negative"), ({"reading": 0.0}, "not zero")],
)
def test_bad_mixes_are_refused(mix, match):
    with pytest.raises(UserError, match=match):
        sample_conversation(desk(), random.Random(0), mix)


@pytest.mark.parametrize("name", BOX_FORMATS)
def test_rendered_boxes_are_read_back(records, name):
    form = box_format(name)
    for record in records:
        frame = ImageFrame.letterbox((record.width, record.height), 224)
        dx, dy = form.quantum(frame)
        for turn in [*KINDS["several"](record, random.Random(0)), *KINDS["listing"](record, random.Random(0))]:
            (rendered,) = render_turns([turn], form, frame)
            parsed = form.parse(rendered.answer, frame)
            assert parsed.status == "boxes" and len(parsed.boxes) == len(boxes_of(turn).boxes)
            for found, true in zip(parsed.boxes, boxes_of(turn).boxes, strict=True):
                assert all(
                    abs(a - b) <= quantum + 1e-6 for a, b, quantum in zip(found, true, (dx, dy, dx, dy), strict=True)
                )


def test_a_crop_drops_what_it_does_not_show():
    turns = [*KINDS["grounding"](desk(), random.Random(0)), *KINDS["reading"](desk(), random.Random(0))]
    left_half = ImageFrame.crop((400, 200), (0, 0, 150, 200), (150, 200))
    questions = {turn.question for turn in render_turns(turns, INT1000, left_half)}
    assert questions == {"Where is red star?", "Where is blue star?", "Where is leftmost star?"}


def test_labels_that_the_format_cannot_write_are_left_out():
    record = Record(image="x", width=9, height=9, regions=[Region(box_xyxy=(0, 0, 5, 5), category="list [a]")])
    frame = ImageFrame.identity((9, 9))
    (turn,) = KINDS["listing"](record, random.Random(0))
    assert render_turns([turn], INT1000, frame) == []
    assert len(render_turns([turn], box_format("qwen3_json"), frame)) == 1


def test_text_messages_stand_for_the_image():
    record, frame = desk(), ImageFrame.identity((400, 200))
    (compare,) = [
        turn
        for turn in KINDS["compare"](record, random.Random(1))
        if turn.question_boxes == (record.regions[0].box_xyxy, record.regions[2].box_xyxy)
    ]
    (reading,) = KINDS["reading"](record, random.Random(0))
    scene = describe_scene(record, random.Random(0), INT1000, frame)
    assert sorted(scene.splitlines()) == sorted(
        [
            "[0, 100, 150, 400] red star",
            "[250, 50, 350, 250] blue star",
            '[500, 500, 750, 700] red sign "apple"',
            "[0, 750, 1000, 1000] grass",
        ]
    )
    rendered = render_turns([reading, compare], INT1000, frame)
    messages = text_messages(rendered, INT1000, frame, scene, record.regions)
    assert [message["role"] for message in messages] == ["user", "assistant"] * 2
    assert messages[0]["content"] == scene + 'Read red sign "apple" [500, 500, 750, 700].'
    assert messages[1]["content"] == "apple"
    for words in ("red star [0, 100, 150, 400]", 'red sign "apple" [500, 500, 750, 700]'):
        assert words in messages[2]["content"]
    without = text_messages(rendered, INT1000, frame)
    assert without[0]["content"] == "Read <region> [500, 500, 750, 700]."


def test_a_point_has_the_words_of_the_smallest_region_around_it():
    inner = Region(box_xyxy=(20, 20, 30, 30), category="button")
    outer = Region(box_xyxy=(0, 0, 60, 60), category="coat")
    turn = RenderedTurn("What is at <region>? And at <region>?", ((22, 22, 27, 27), (52, 2, 57, 7)), "a button, a coat")
    frame = ImageFrame.identity((100, 100))
    (asked, _) = text_messages([turn], INT1000, frame, regions=[outer, inner])
    assert asked["content"] == "What is at button [220, 220, 270, 270]? And at coat [520, 20, 570, 70]?"
    (asked, _) = text_messages([turn], INT1000, frame, regions=[inner])
    assert asked["content"].endswith("And at <region> [520, 20, 570, 70]?")


def test_corpus_holds_every_text(records):
    for record in records:
        texts = list(corpus_texts(record, random.Random(0), INT1000))
        for region in record.regions:
            assert {*region.texts, *region.captions, *([region.ocr] if region.ocr else [])} <= set(texts)
        assert set(record.captions) <= set(texts)
