"""Answers cut into words and boxes, in every convention; and their HTML, with everything escaped."""

import re

import pytest

from regiontower.demo.answer_html import conversation_html, outlines, question_html, remark
from regiontower.demo.conversation import Turn
from regiontower.demo.grounding import found_boxes, ground_answer
from regiontower.demo.marks import Mark
from regiontower.demo.questions import AskedQuestion
from regiontower.demo.saved_page import saved_page
from regiontower.mllm.boxes import BOX_FORMATS, Boxes, ImageFrame, box_format

FRAME = ImageFrame.letterbox((200, 100), 112)
BOXES = Boxes([[10, 10, 50, 50], [60, 20, 90, 80], [100, 10, 150, 60]])


def ground(text, scores=(0.9, 0.8, 0.7), convention="int1000", phrase=""):
    return ground_answer(text, box_format(convention).parse(text, FRAME), scores, convention, phrase)


@pytest.mark.parametrize("convention", sorted(BOX_FORMATS))
def test_labelled_boxes_keep_their_words_in_every_convention(convention):
    text = box_format(convention).write(BOXES, FRAME, ["red star", "red star", "blue heart"])
    pieces = ground(text, convention=convention)
    boxes = found_boxes(pieces)
    assert [(piece.label, piece.score) for piece in boxes] == [
        ("red star", 0.9),
        ("red star", 0.8),
        ("blue heart", 0.7),
    ]
    quantum = max(box_format(convention).quantum(FRAME))
    for piece, box in zip(boxes, BOXES, strict=True):
        assert piece.box_xyxy == pytest.approx(box, abs=quantum)
    words = [(piece.text, piece.boxes) for piece in pieces if piece.kind == "words"]
    assert words in (
        [("red star", (0, 1)), ("blue heart", (2,))],
        [("red star", (0,)), ("red star", (1,)), ("blue heart", (2,))],  # a label for every box, as in JSON
    )
    shown = "".join(piece.text for piece in pieces if piece.kind != "box")
    assert not re.search(r"[<>\[\]{}]", shown)


def test_sentences_keep_their_punctuation_and_joining_words_ground_nothing():
    pieces = ground("The red star is at [10, 20, 30, 40] and a cat in [50, 60, 70, 80].")
    assert [(piece.kind, piece.text) for piece in pieces] == [
        ("words", "The red star"),
        ("text", " is at "),
        ("box", "[10, 20, 30, 40]"),
        ("text", " and "),
        ("words", "a cat"),
        ("text", " in "),
        ("box", "[50, 60, 70, 80]"),
        ("text", "."),
    ]
    pieces = ground("It is at [10, 20, 30, 40].", phrase="red star")
    assert [piece.kind for piece in pieces] == ["text", "box", "text"] and pieces[1].label == "red star"


def test_no_box_and_broken_boxes_are_plain_text():
    for text in ("none", "a [1, 2", ""):
        assert [piece.text for piece in ground(text)] == ([text] if text else [])


def turn(answer="red star [10, 20, 30, 40]", **fields):
    asked = AskedQuestion("What is in <region>?", (Mark(2, (1, 2, 30, 40), None, "my <b>"),))
    pieces = ground(answer)
    return Turn(1, "What is in [2]?", asked, answer, pieces, "boxes", "done", **fields)


def test_words_chips_and_outlines_share_their_ids():
    html, drawn = conversation_html([turn()], "A"), outlines([turn()], "A")
    assert {row["kind"] for row in drawn} == {"asked", "found"}
    for row in drawn:
        assert f'data-boxes="{row["id"]}"' in html
    found = next(row for row in drawn if row["kind"] == "found")
    assert found["text"] == "red star 0.90" and found["last"]
    assert html.count(f'data-boxes="{found["id"]}"') == 2  # the words and the box


def test_only_the_last_turn_with_boxes_is_shown_by_itself():
    second = turn()
    second.number = 2
    third = turn("none")
    third.number, third.pieces = 3, ground("none")
    shown = [row["turn"] for row in outlines([turn(), second, third], "A") if row["kind"] == "found" and row["last"]]
    assert shown == [2]


EVIL = "<img src=x onerror=alert(1)> ${alert(2)} {{alert(3)}} `x` </script><script>alert(4)</script> \" ' &amp;"


def test_html_of_users_and_models_is_escaped_everywhere(noise_image):
    asked = AskedQuestion("x", (Mark(1, (1, 2, 3, 4), None, EVIL),), EVIL)
    for state in ("answering", "done", "stopped", "failed"):
        evil = Turn(1, EVIL + " [1]", asked, EVIL, ground(EVIL), "none", state, error=EVIL)
        page = saved_page(noise_image(), {EVIL: [evil]})
        for html in (conversation_html([evil], "A"), page):
            assert "<img" not in html and "<script" not in html and "onerror" in html
    grounded = ground(f"{EVIL} [10, 20, 30, 40]", phrase=EVIL)
    html = conversation_html([Turn(1, "x", asked, "", grounded, "boxes", "done")], "A")
    assert "<img" not in html and "<script" not in html


def test_a_question_that_says_this_shows_what_it_meant():
    asked = AskedQuestion("Read <region>.", (Mark(3, (1, 2, 3, 4)),))
    html = question_html(Turn(5, "Read this.", asked), "B")
    assert html.startswith("Read this. <span") and 'data-boxes="B5q0"' in html and "[3]" in html


def test_the_saved_page_stands_alone_and_draws_boxes_where_they_are(noise_image):
    page = saved_page(noise_image(200, 100), {"nano": [turn()], "silent": []})
    assert 'rect x="2.00" y="2.00" width="4.00" height="2.00"' in page  # [10, 20, 30, 40] thousandths of 200 x 100
    assert "default-src 'none'" in page and "silent" not in page
    assert re.findall(r'(?:src|href)="(?!data:|#)[^"]*"', page) == []


def test_what_stands_under_an_answer_says_how_many_boxes_there_are_or_none():
    asked = AskedQuestion("Where is star?", phrase="star")
    several = ground("[10, 20, 30, 40] [50, 60, 70, 80]", phrase="star")
    for pieces, status, says in (
        (several, "boxes", "2 boxes"),
        (several[:1], "boxes", "1 box"),
        (ground("none"), "none", "nothing found"),
        (ground("[10, 20"), "malformed", "its boxes cannot be read"),
    ):
        assert remark(Turn(1, "Find the star", asked, "x", pieces, status, "done")) == says
    assert (
        remark(Turn(1, "Hi", AskedQuestion("Hi"), "none", ground("none"), "none", "done")) == ""
    )  # nothing was sought
