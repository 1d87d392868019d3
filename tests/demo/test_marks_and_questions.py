"""Marks from untrusted JSON; chips and shortcuts in questions."""

import pytest

from regiontower.demo.limits import Limits
from regiontower.demo.marks import Mark, read_marks
from regiontower.demo.questions import prepare_question, without_tokens
from regiontower.vision_towers import UserError

SIZE = (200, 100)
BOX, POINT = Mark(1, (10, 10, 50, 50), None, "cup"), Mark(4, (97.5, 47.5, 102.5, 52.5), (100, 50))


def ask(text, marks=(BOX, POINT), selected=None):
    return prepare_question(text, marks, selected, ["<|end|>"], Limits(question_chars=200))


def test_boxes_are_cut_to_the_picture_and_points_become_small_boxes():
    rows = [{"box_xyxy": [-5, 10, 250, 50]}, {"number": 7, "point_xy": [199, 50], "label": " my\n[dot] "}]
    first, second = read_marks(rows, SIZE, Limits())
    assert first == Mark(1, (0, 10, 200, 50))
    assert second == Mark(7, (196.5, 47.5, 200, 52.5), (199, 50), "my dot")
    assert read_marks(None, SIZE, Limits()) == []


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ("[1]", "marks is a list of objects"),
        ([[1, 2, 3, 4]], "marks is a list of objects"),
        ([{"number": 1}], "needs either box_xyxy or point_xy"),
        ([{"box_xyxy": [1, 2, 3, 4], "point_xy": [1, 2]}], "needs either"),
        ([{"box_xyxy": [1, 2, 3]}], "must be 4 numbers"),
        ([{"box_xyxy": "1234"}], "must be 4 numbers"),
        ([{"box_xyxy": [1, 2, float("nan"), 4]}], "4 finite numbers"),
        ([{"box_xyxy": [1, 2, True, 4]}], "4 finite numbers"),
        ([{"box_xyxy": [50, 2, 3, 4]}], "inverted"),
        ([{"box_xyxy": [300, 2, 400, 4]}], "covers nothing"),
        ([{"box_xyxy": [5, 5, 5, 9]}], "covers nothing"),
        ([{"point_xy": [300, 2]}], "outside the 200 x 100 picture"),
        ([{"number": "1", "point_xy": [3, 2]}], "whole number"),
        ([{"number": 0, "point_xy": [3, 2]}], "whole number"),
        ([{"label": 3, "point_xy": [3, 2]}], "must be text"),
        ([{"number": 2, "point_xy": [3, 2]}, {"number": 2, "point_xy": [4, 2]}], "one number"),
        ([{"point_xy": [3, 2]}] * 25, "25 marks are too many"),
    ],
)
def test_other_marks_are_refused_in_one_sentence(rows, says):
    with pytest.raises(UserError, match=says):
        read_marks(rows, SIZE, Limits())


@pytest.mark.parametrize(
    ("typed", "text", "marks"),
    [
        ("What is in [1]?", "What is in <region>?", (BOX,)),
        ("Is [4] in [1] or [ 4 ]?", "Is <region> in <region> or <region>?", (POINT, BOX, POINT)),
        ("What is in [CUP]?", "What is in <region>?", (BOX,)),
        ("What does [sic] mean?", "What does [sic] mean?", ()),
        ("Find the red star.", "Where is red star?", ()),
        ("where are all the stars??", "Where is stars?", ()),
        ("Find what is in [1]", "Find what is in <region>", (BOX,)),
        ("Describe the image.", "Describe the image.", ()),
    ],
)
def test_chips_become_regions_and_shortcuts_the_trained_questions(typed, text, marks):
    asked = ask(typed)
    assert (asked.text, asked.marks) == (text, marks)


def test_this_is_the_selected_mark_or_the_only_one():
    assert ask("Read this.", selected=1) == ask("read it", marks=(BOX,))
    assert ask("Read this.", selected=1).text == "Read <region>."
    assert ask("What is this?", selected=1).text == "What is in <region>?"
    assert ask("what's that", selected=4).text == "What is at <region>?"
    with pytest.raises(UserError, match="draw a box or a point first"):
        ask("Read this.", marks=())
    with pytest.raises(UserError, match="which one"):
        ask("Read this.")


def test_what_cannot_be_asked_is_said():
    for text, says in (
        ("  ", "type a question"),
        ("x" * 201, "201 characters"),
        ("What is in [2]?", r"no mark \[2\] on the picture \(\[1\], \[4\]\)"),
        ("<image><region>", "type a question"),
    ):
        with pytest.raises(UserError, match=says):
            ask(text)


def test_nobody_writes_the_models_own_tokens():
    assert ask("Hi<|end|><image> <regi<region>on>there").text == "Hi there"
    assert without_tokens("<im<image>age>x", ["<image>"]) == "x"
