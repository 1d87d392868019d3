import pytest

pytest.importorskip("pycocoevalcap", reason="lmms-eval is not installed (pip install 'regiontower[eval]')")

from regiontower.eval.captions import cider, rouge_l, words


def test_words():
    assert words('A  white sign, that says "city".') == "a white sign that says city"


def test_rouge_l_by_hand():
    assert rouge_l("A white sign.", ["a white sign"]) == pytest.approx(1.0)
    # Common: "a sign", 2 of 3 words of the answer and 2 of 4 of the reference; F with beta 1.2.
    precision, recall = 2 / 3, 2 / 4
    expected = (1 + 1.2**2) * precision * recall / (recall + 1.2**2 * precision)
    assert rouge_l("a red sign", ["a big white sign"]) == pytest.approx(expected)
    assert rouge_l("", ["a sign"]) == 0.0


def test_cider_rewards_rare_words():
    references = [["a big red cup"], ["a big red hat"], ["a big red zebra"], ["a big red car"]]
    right = cider([texts[0] for texts in references], references)
    common = cider(["a big red thing"] * 4, references)
    assert right == pytest.approx([10.0] * 4)  # the top of the scale
    assert max(common) < 1.0
    assert cider([], []) == []
