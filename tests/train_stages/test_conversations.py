"""Every turn is true of its record, found out the slow way, and rendering keeps what the turn says."""

import random

import pytest

from regiontower.mllm import prompts
from regiontower.mllm.boxes import BOX_FORMATS, Boxes, ImageFrame, box_format
from regiontower.train_stages.conversation_kinds import KINDS, BoxList, Turn, canonical_phrase, reading_order
from regiontower.train_stages.conversations import (
    DEFAULT_MIX,
    RenderedTurn,
    corpus_texts,
    describe_scene,
    render_turns,
    sample_conversation,
    text_messages,
)
from regiontower.train_stages.plurals import plural
from regiontower.train_stages.records import PointLabel, Record, Region
from regiontower.train_stages.scenes import CATEGORIES, generate_scene
from regiontower.train_stages.scenes import plural as scene_plural
from regiontower.vision_towers.errors import UserError

INT1000 = box_format("int1000")


def desk() -> Record:
    """A record with everything: two stars that share a phrase, a sign, grass, points, absent phrases, bad markers."""
    return Record(
        image="desk.png",
        width=400,
        height=200,
        captions=["Two stars and a sign.", "broken <image> caption"],
        absent=["green star", "<region>"],
        points=[PointLabel(xy=(1.0, 30.0), texts=["leftmost star"]), PointLabel(xy=(350, 150), texts=[])],
        regions=[
            Region(
                box_xyxy=(0, 20, 60, 80),
                category="star",
                texts=["Star", "red star", "leftmost star"],
                captions=["a red star"],
                tags=["star", "red"],
            ),
            Region(
                box_xyxy=(100, 10, 140, 50),
                category="star",
                texts=["star", "blue star"],
                captions=["a blue star", "a star at the top"],
                tags=["star", "blue"],
            ),
            Region(
                box_xyxy=(200, 100, 300, 140),
                category="sign",
                texts=["sign", 'sign "apple"'],
                tags=["sign", "red"],
                ocr="apple",
            ),
            Region(box_xyxy=(0, 150, 400, 200), category="grass", stuff=True),
            Region(box_xyxy=(310, 10, 390, 40), ocr="buy <|end|> now"),
        ],
    )


def receipt(lines: int = 60) -> Record:
    """Text lines alone, as many as a long receipt has."""
    regions = [
        Region(box_xyxy=(10, 10 * i + 1, 200, 10 * i + 9), ocr=f"LINE {i}", texts=[f'the text "LINE {i}"'])
        for i in range(lines)
    ]
    return Record(image="receipt.png", width=210, height=10 * lines + 10, regions=regions)


def bare() -> Record:
    return Record(image="bare.png", width=10, height=10)


@pytest.fixture(scope="module")
def records() -> list[Record]:
    return [desk(), receipt(), *(generate_scene(seed).record for seed in range(6))]


def says(turn: Turn) -> str:
    assert all(isinstance(part, str) for part in turn.answer)
    return "".join(part for part in turn.answer if isinstance(part, str))


def boxes_of(turn: Turn) -> BoxList:
    (answer,) = turn.answer
    assert isinstance(answer, BoxList)
    return answer


def owners(record: Record, phrase: str) -> list[Region]:
    return [region for region in record.regions if phrase.lower() in [text.lower() for text in region.texts]]


def phrase_of(turn: Turn) -> str:
    before, after = prompts.LOCATE.split("{phrase}")
    assert turn.question.startswith(before) and turn.question.endswith(after)
    return turn.question[len(before) : len(turn.question) - len(after)]


def region_of(record: Record, turn: Turn) -> Region:
    (box,) = turn.question_boxes
    (region,) = (region for region in record.regions if region.box_xyxy == box)
    return region


def check_true(record: Record, turn: Turn) -> None:
    """Brute force: what the turn says, read off the record by other means."""
    if turn.kind in ("grounding", "named"):
        (owner,) = owners(record, phrase_of(turn))
        assert boxes_of(turn).boxes == (owner.box_xyxy,)
    elif turn.kind == "several":
        found = [region.box_xyxy for region in owners(record, phrase_of(turn))]
        assert len(found) >= 2
        assert list(boxes_of(turn).boxes) == sorted(found, key=lambda box: (box[1], box[0]))
    elif turn.kind == "absent":
        assert phrase_of(turn) in record.absent and not owners(record, phrase_of(turn))
        assert says(turn) == "none"
    elif turn.kind == "referring":
        assert turn.question == prompts.REFER
        (owner,) = owners(record, says(turn))
        assert owner is region_of(record, turn)
    elif turn.kind == "reading":
        assert (turn.question, says(turn)) == (prompts.READ, region_of(record, turn).ocr)
    elif turn.kind == "region_caption":
        assert turn.question == prompts.DESCRIBE_REGION and says(turn) in region_of(record, turn).captions
    elif turn.kind == "image_caption":
        assert turn.question == prompts.DESCRIBE_IMAGE and says(turn) in record.captions
    elif turn.kind == "classify":
        assert (turn.question, says(turn)) == (prompts.CLASSIFY, region_of(record, turn).category)
    elif turn.kind == "count":
        named = [
            name for name in {r.category for r in record.regions if r.category} if f" {plural(name)} " in turn.question
        ]
        category = max(named, key=len)
        assert turn.question == f"How many {plural(category)} are there?"
        assert int(says(turn)) == sum(region.category == category for region in record.regions)
        assert not any(region.stuff for region in record.regions if region.category == category)
    elif turn.kind == "compare":
        check_comparison(record, turn)
    elif turn.kind == "point":
        (x1, y1, x2, y2) = turn.question_boxes[0]
        assert 0 <= x1 < x2 <= record.width and 0 <= y1 < y2 <= record.height
        assert any(
            says(turn) in label.texts and x1 <= label.xy[0] <= x2 and y1 <= label.xy[1] <= y2 for label in record.points
        )
    else:
        assert turn.kind == "listing"
        things = [region for region in record.regions if not region.stuff]
        listed = boxes_of(turn)
        assert sorted(zip(listed.boxes, listed.labels or (), strict=True)) == sorted(
            (region.box_xyxy, region.category or region.ocr) for region in things
        )


def check_comparison(record: Record, turn: Turn) -> None:
    first, second = (next(r for r in record.regions if r.box_xyxy == box) for box in turn.question_boxes)
    assert first is not second
    if turn.question == prompts.COMPARE_SIZE:
        areas = Boxes([first.box_xyxy, second.box_xyxy]).area
        assert says(turn) == ("the first" if areas[0] > areas[1] else "the second")
        assert max(areas) / min(areas) >= 1.3
    elif turn.question == prompts.COMPARE_COLOR:
        colors = {"red", "yellow", "green", "blue", "purple", "white"}
        assert says(turn) == ("yes" if colors & set(first.tags) == colors & set(second.tags) else "no")
    else:
        assert turn.question == prompts.COMPARE_KIND
        assert says(turn) == ("yes" if first.category == second.category else "no")


@pytest.mark.parametrize("kind", KINDS)
def test_every_turn_is_true(records, kind):
    turns = [
        (record, turn) for record in records for seed in range(3) for turn in KINDS[kind](record, random.Random(seed))
    ]
    assert turns, f"no record of this test gives a turn of kind {kind}"
    for record, turn in turns:
        assert turn.kind == kind
        assert turn.question.count(prompts.REGION_TOKEN) == len(turn.question_boxes)
        assert not any(marker in turn.question.replace("<region>", "") for marker in ("<image>", "<|end|>", "<pad>"))
        asked = {i for i, region in enumerate(record.regions) if region.box_xyxy in turn.question_boxes}
        assert asked <= turn.regions
        check_true(record, turn)


def test_turns_of_the_desk_are_complete():
    """All that can be asked is asked, each once, and nothing that holds a marker."""

    def answers(kind):
        return sorted(
            (turn.question, *(part if isinstance(part, str) else part.boxes for part in turn.answer))
            for turn in KINDS[kind](desk(), random.Random(0))
        )

    first, second, sign = (region.box_xyxy for region in desk().regions[:3])
    assert answers("grounding") == [
        ("Where is blue star?", (second,)),
        ("Where is leftmost star?", (first,)),
        ("Where is red star?", (first,)),
        ('Where is sign "apple"?', (sign,)),
        ("Where is sign?", (sign,)),
    ]
    assert answers("several") == [("Where is Star?", (second, first))]
    assert answers("absent") == [("Where is green star?", "none")]
    assert answers("referring") == [(prompts.REFER, "blue star"), (prompts.REFER, "red star"), (prompts.REFER, "sign")]
    assert answers("reading") == [(prompts.READ, "apple")]
    assert answers("image_caption") == [(prompts.DESCRIBE_IMAGE, "Two stars and a sign.")]
    assert answers("count") == [("How many signs are there?", "1"), ("How many stars are there?", "2")]
    assert answers("point") == [(prompts.POINT, "leftmost star")]
    assert answers("listing") == [], "one region's only name holds a marker, so not everything can be listed"


def test_grounding_asks_every_region_before_a_second_phrase():
    for seed in range(10):
        turns = list(KINDS["grounding"](desk(), random.Random(seed)))
        assert len({turn.regions for turn in turns[:3]}) == 3


def test_named_asks_by_a_regions_own_words():
    things = [
        Region(
            box_xyxy=(0, 0, 9, 9), category="star", tags=["star", "red"], texts=["star", "red star", "topmost star"]
        ),
        Region(
            box_xyxy=(9, 9, 19, 19), category="star", tags=["star", "blue"], texts=["star", "star below the red star"]
        ),
        Region(box_xyxy=(0, 9, 9, 19), category="sign", ocr="no way", texts=['sign "no way"', "sign left of the star"]),
    ]
    record = Record(image="a.png", width=32, height=32, regions=things)
    questions = {turn.question for seed in range(9) for turn in KINDS["named"](record, random.Random(seed))}
    # "star" is true of two things, and the blue star has no phrase of its own words alone.
    assert questions == {prompts.LOCATE.format(phrase=phrase) for phrase in ("red star", 'sign "no way"')}


def test_canonical_phrase_prefers_what_the_region_shows():
    region = Region(box_xyxy=(0, 0, 9, 9), category="star", tags=["star", "red"])
    assert canonical_phrase(["star", "leftmost star", "red star"], [region]) == "red star"
    assert canonical_phrase(["largest star", "leftmost red star", "star left of the sign"], [region]) == "largest star"
    untagged = Region(box_xyxy=(0, 0, 9, 9))
    assert canonical_phrase(["the third dog", "the cat", "the ant"], [untagged]) == "the ant"


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


def test_plurals():
    for category in CATEGORIES:
        assert plural(category) == scene_plural(category)
    expected = {
        "wine glass": "wine glasses",
        "person": "people",
        "Person": "People",
        "bus": "buses",
        "bench": "benches",
        "toothbrush": "toothbrushes",
        "knife": "knives",
        "teddy bear": "teddy bears",
        "sheep": "sheep",
        "toy": "toys",
        "berry": "berries",
        "box": "boxes",
    }
    assert {word: plural(word) for word in expected} == expected


def test_reading_order_goes_down_then_right():
    assert reading_order([(50, 9, 60, 20), (0, 5, 9, 20), (10, 9, 20, 12)]) == [1, 2, 0]
