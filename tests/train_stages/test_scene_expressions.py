"""Every phrase of the grammar, re-derived from the records alone: written again from its definition, not imported."""

from collections import Counter

import numpy as np
import pytest

from regiontower.train_stages.phrases import unique_texts
from regiontower.train_stages.scenes import CATEGORIES, COLORS, SEEN_WORDS, SIGN, generate_scene, phrase_kind
from regiontower.train_stages.scenes.expressions import Thing, absent_phrases, holds, true_phrases

SEEDS = range(20_000, 20_100)


@pytest.fixture(scope="module")
def records():
    return [generate_scene(seed).record for seed in SEEDS]


def brute_force(record):
    """Phrase -> set of indices, from boxes, categories, tags and transcripts of the record."""
    regions = [region for region in record.regions if not region.stuff]
    unit = float(min(record.width, record.height))
    boxes = np.array([region.box_xyxy for region in regions])
    cx, cy = (boxes[:, 0] + boxes[:, 2]) / 2, (boxes[:, 1] + boxes[:, 3]) / 2
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    truth = {}
    sets = {}
    for category in (*CATEGORIES, SIGN):
        sets[category] = {i for i, r in enumerate(regions) if r.category == category}
        for color in COLORS:
            sets[f"{color} {category}"] = {i for i in sets[category] if regions[i].tags[1] == color}
    sets = {name: members for name, members in sets.items() if members}
    truth.update(sets)
    quoted = {}
    for i, region in enumerate(regions):
        if region.ocr:
            quoted[f'sign "{region.ocr}"'] = {i}
            truth[f'{region.tags[1]} sign "{region.ocr}"'] = {i}
    truth.update(quoted)
    for name, members in sets.items():
        for word, key, lead in (
            ("leftmost", -cx / unit, 0.05),
            ("rightmost", cx / unit, 0.05),
            ("topmost", -cy / unit, 0.05),
            ("bottommost", cy / unit, 0.05),
            ("largest", np.log(areas), np.log(1.35)),
            ("smallest", -np.log(areas), np.log(1.35)),
        ):
            best = max(members, key=lambda i, key=key: key[i])
            rest = [key[i] for i in members if i != best]
            if rest and key[best] - max(rest) >= lead:
                truth[f"{word} {name}"] = {best}
    unique = {name: next(iter(members)) for name, members in {**sets, **quoted}.items() if len(members) == 1}
    for anchor_name, anchor in unique.items():
        for word, dx, dy in (
            ("left of", cx[anchor] - cx, cy - cy[anchor]),
            ("right of", cx - cx[anchor], cy - cy[anchor]),
            ("above", cy[anchor] - cy, cx - cx[anchor]),
            ("below", cy - cy[anchor], cx - cx[anchor]),
        ):
            clear = (dx / unit >= 0.12) & (np.abs(dy) <= 0.8 * dx)
            not_at_all = dx / unit <= 0.02
            for name, members in sets.items():
                asked = members - {anchor}
                if all(clear[i] or not_at_all[i] for i in asked) and any(clear[i] for i in asked):
                    truth[f"{name} {word} the {anchor_name}"] = {i for i in asked if clear[i]}
    return truth


def test_texts_are_exactly_the_phrases_that_are_clearly_true(records):
    for record in records:
        stated = {}
        for i, region in enumerate(record.regions):
            assert len(set(region.texts)) == len(region.texts)
            for text in region.texts:
                stated.setdefault(text, set()).add(i)
        assert stated == brute_force(record)


def test_superlatives_and_relations_hold_in_plain_words(records):
    """A weaker check without margins, so that a wrong definition in both places above would still show."""
    for record in records:
        regions = record.regions
        for region in regions:
            for text in region.texts:
                x0, y0, x1, y1 = region.box_xyxy
                if text.startswith(("leftmost ", "topmost ", "rightmost ", "bottommost ")):
                    word, noun = text.split(" ", 1)
                    rivals = [r.box_xyxy for r in regions if noun in r.texts and r is not region]
                    assert rivals
                    for rx0, ry0, rx1, ry1 in rivals:
                        left, up = x0 + x1 < rx0 + rx1, y0 + y1 < ry0 + ry1
                        right, down = x0 + x1 > rx0 + rx1, y0 + y1 > ry0 + ry1
                        verdicts = {"leftmost": left, "topmost": up, "rightmost": right, "bottommost": down}
                        assert verdicts[word]
                if " left of the " in text:
                    anchors = [r for r in regions if text.split(" left of the ")[1] in r.texts]
                    assert len(anchors) == 1 and anchors[0] is not region
                    assert x0 < anchors[0].box_xyxy[2] and x0 + x1 < anchors[0].box_xyxy[0] + anchors[0].box_xyxy[2]


def test_absent_phrases_are_true_of_nothing(records):
    kinds = Counter()
    for record in records:
        assert 3 <= len(record.absent) <= 6 and len(set(record.absent)) == len(record.absent)
        regions = [region for region in record.regions if not region.stuff]
        present = {region.category for region in regions}
        for text in record.absent:
            if '"' in text:
                kinds["word"] += 1
                word = text.split('"')[1]
                assert word in SEEN_WORDS and word not in {region.ocr for region in regions} and SIGN in present
                continue
            first, _, rest = text.partition(" ")
            color, category = (first, rest) if first in COLORS else (None, text)
            assert category in (*CATEGORIES, SIGN)
            assert not any(r.category == category and color in (None, r.tags[1]) for r in regions)
            kinds["recolored" if category in present else "category"] += 1
    total = sum(kinds.values())
    assert kinds["recolored"] > 0.35 * total and kinds["category"] > 0.15 * total and kinds["word"] > 0.1 * total


def test_most_objects_have_a_unique_phrase_and_many_scenes_a_shared_one(records, record_property):
    things = singled = shared_scenes = 0
    kinds = Counter()
    for record in records:
        unique = unique_texts(record)
        kinds.update(phrase_kind(text) for text in unique)
        things += sum(not region.stuff for region in record.regions)
        singled += len(set(unique.values()))
        shared_scenes += any(len(members) > 1 for members in brute_force(record).values())
    share = singled / things
    record_property("share_of_objects_with_a_unique_phrase", share)
    print(f"objects with a unique phrase: {share:.3f}; scenes with a shared phrase: {shared_scenes / len(records):.3f}")
    assert share >= 0.97
    assert shared_scenes >= 0.5 * len(records)
    assert set(kinds) == {"noun", "sign", "extreme", "size", "relation"}


# --- small scenes by hand ------------------------------------------------------------------------------------------


def star(x, y, side=20.0, color="red"):
    return Thing((x, y, x + side, y + side), "star", color)


def test_phrase_of_two_referents_stands_at_both():
    phrases = true_phrases([star(0, 0), star(100, 0), star(200, 0, color="blue")], 300)
    assert phrases["red star"] == (0, 1) and phrases["star"] == (0, 1, 2) and phrases["blue star"] == (2,)
    assert phrases["leftmost star"] == (0,) and phrases["rightmost red star"] == (1,)
    assert phrases["star left of the blue star"] == (0, 1)


def test_what_is_within_the_margin_is_said_of_nothing():
    close = true_phrases([star(0, 0), star(10, 100)], 300)
    assert not {"leftmost star", "rightmost star"} & set(close)
    assert close["topmost star"] == (0,)
    assert not {"largest star", "smallest star"} & set(true_phrases([star(0, 0, 20), star(100, 0, 22)], 300))
    assert true_phrases([star(0, 0, 20), star(100, 0, 30)], 300)["largest star"] == (1,)


def test_superlatives_need_a_second_member():
    assert set(true_phrases([star(0, 0)], 300)) == {"star", "red star"}


def test_one_unclear_candidate_silences_a_relation():
    heart = Thing((200, 100, 220, 120), "heart", "blue")
    clear, oblique = star(20, 100), star(170, 250)
    assert holds("left of", clear, heart, 300) is True
    assert holds("left of", oblique, heart, 300) is None
    assert holds("right of", clear, heart, 300) is False
    both = true_phrases([clear, oblique, heart], 300)
    assert "star left of the heart" not in both
    assert true_phrases([clear, heart], 300)["star left of the heart"] == (0,)


def test_anchor_must_be_unique_and_is_no_candidate_itself():
    two_hearts = [Thing((x, 0, x + 20, 20), "heart", "blue") for x in (200, 260)]
    phrases = true_phrases([star(0, 0), *two_hearts], 300)
    assert "star left of the heart" not in phrases and "heart left of the blue heart" not in phrases
    mixed = [star(0, 0), Thing((200, 0, 220, 20), "star", "blue")]
    assert true_phrases(mixed, 300)["star left of the blue star"] == (0,)


def test_signs_are_quoted():
    sign = Thing((100, 0, 160, 30), SIGN, "green", "apple")
    phrases = true_phrases([sign, star(0, 5)], 300)
    assert {'sign "apple"', 'green sign "apple"', "sign", "green sign"} <= set(phrases)
    assert phrases['star left of the sign "apple"'] == (1,)
    assert not any('the green sign "apple"' in phrase for phrase in phrases)


def test_absent_words_need_a_sign():
    rng = np.random.default_rng(0)
    for _ in range(50):
        assert not any('"' in text for text in absent_phrases(rng, [star(0, 0)], SEEN_WORDS))


@pytest.mark.parametrize(
    ("phrase", "kind"),
    [
        ("check mark", "noun"),
        ("red peace symbol", "noun"),
        ('blue sign "apple"', "sign"),
        ("leftmost red star", "extreme"),
        ("largest sign", "size"),
        ('star below the sign "apple"', "relation"),
        ("star left of the red music note", "relation"),
    ],
)
def test_phrase_kind(phrase, kind):
    assert phrase_kind(phrase) == kind
