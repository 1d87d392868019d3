import pytest

from regiontower.eval.choices import ChoiceScore, score_choice


@pytest.mark.parametrize(
    ("answer", "correct", "named"),
    [
        ("A cup.", True, True),
        ("It is a CUP", True, True),
        ("The object is a cup, not a bowl.", True, True),
        ("cups", True, True),
        ("a bowl", False, False),
        ("Not a cup, but a bowl.", False, False),
        ("a cup or a bowl", False, True),  # both: Ferret counts it, we do not
        ("a cupboard", False, True),  # a part of another word: likewise
        ("a mug", True, True),  # a synonym
        ("", False, False),
    ],
)
def test_one_name_and_not_the_other(answer, correct, named):
    assert score_choice(answer, ["cup", "mug"], "bowl") == ChoiceScore(correct, named)


def test_a_name_within_the_other():
    assert score_choice("a ball", ["ball"], "ball bearing").correct
    assert not score_choice("a ball bearing", ["ball"], "ball bearing").correct
    assert score_choice("a ball bearing", ["ball bearing"], "ball").correct
    assert not score_choice("a ball", ["ball bearing"], "ball").correct


def test_underscores_are_spaces():
    assert score_choice("a baseball bat", ["baseball_bat"], "bat_(animal)").correct
