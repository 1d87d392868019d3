"""Every turn is true of its record, found out the slow way."""

import random

import pytest
from conversation_records import boxes_of, desk, every_record

from regiontower.mllm import prompts
from regiontower.mllm.boxes import Boxes
from regiontower.train_stages.conversation_kinds import KINDS, Turn, canonical_phrase, reading_order
from regiontower.train_stages.plurals import plural
from regiontower.train_stages.records import Record, Region
from regiontower.train_stages.scenes import CATEGORIES
from regiontower.train_stages.scenes import plural as scene_plural


@pytest.fixture(scope="module")
def records() -> list[Record]:
    return every_record()


def says(turn: Turn) -> str:
    assert all(isinstance(part, str) for part in turn.answer)
    return "".join(part for part in turn.answer if isinstance(part, str))


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
