"""`bench demo-load` notices what it is there for: another session's answer or word, an error, a missing answer."""

import json
from itertools import islice

import pytest

from regiontower.benchmarks import demo_load, run_benchmark
from regiontower.benchmarks.demo_load import QUESTIONS, READINGS, Talk, readable_scenes, scenes_with_words, summary
from regiontower.vision_towers import UserError
from regiontower.vision_towers.packaged import packaged_models

WORDS = ["house", "river", "tiger"]


def talks():
    """Three conversations of five turns, as they are alone."""
    return [Talk([word, "a sign", f"[{i}, 2, 3, 4]", f"a {word}", word], [0.1] * 5) for i, word in enumerate(WORDS)]


def test_conversations_that_are_the_same_are_in_order():
    found = summary(WORDS, talks(), talks())
    assert (found["errors"], found["crosstalk"], found["words_of_others"], found["answers"]) == (0, 0, 0, 15)
    assert found["own_word_read"] == 3
    assert found["different"] == [3, 1, 3, 3, 3]  # nobody could see that "a sign" was another's


@pytest.mark.parametrize("turn", range(5))
def test_answers_that_go_to_the_wrong_session_are_counted(turn):
    mixed = talks()
    mixed[0].answers[turn], mixed[1].answers[turn] = mixed[1].answers[turn], mixed[0].answers[turn]
    found = summary(WORDS, talks(), mixed)
    assert found["crosstalk"] == (0 if turn == 1 else 2)
    assert found["words_of_others"] == (2 if QUESTIONS[turn] in READINGS else 0)
    assert found["own_word_read"] == (1 if turn == 0 else 3)


def test_errors_missing_answers_and_times_are_counted():
    broken = talks()
    broken[2] = Talk(["tiger"], [0.6], ["RuntimeError: x"])
    found = summary(WORDS, talks(), broken)
    assert (found["errors"], found["first_errors"], found["answers"]) == (1, ["RuntimeError: x"], 11)
    assert (found["ttft_p50"], found["ttft_alone_p95"]) == (0.1, 0.1)
    assert summary(WORDS, [Talk()] * 3, [Talk()] * 3)["ttft_p50"] is None


def test_pictures_hold_words_of_their_own():
    scenes = list(islice(scenes_with_words(), 4))
    assert len({word for _, word in scenes}) == 4 and demo_load.FIRST_SEED > 1_000_000
    assert all([r.ocr for r in scene.record.regions if r.ocr] == [word] for scene, word in scenes)


def test_only_pictures_whose_word_is_read_are_taken(monkeypatch):
    scenes = [(object(), f"word{i}") for i in range(100)]
    monkeypatch.setattr(demo_load, "scenes_with_words", lambda: iter(scenes))
    reads = {id(scene): word if i % 3 == 0 else "other" for i, (scene, word) in enumerate(scenes)}
    monkeypatch.setattr(demo_load, "converse", lambda url, scene, turns: Talk([reads[id(scene)]]))
    assert readable_scenes("", 4) == ([scenes[0], scenes[3], scenes[6], scenes[9]], 10)
    monkeypatch.setattr(demo_load, "converse", lambda url, scene, turns: Talk(["other"]))
    with pytest.raises(UserError, match="reads 0 words of 40 pictures"):
        readable_scenes("", 4)


def test_a_few_programs_at_once_hear_nothing_of_each_other(capsys, monkeypatch):
    pytest.importorskip("gradio", reason="Gradio is not installed (extra: demo)")
    if "nano" not in packaged_models():
        pytest.skip("the packaged model is not here")
    monkeypatch.setattr("sys.argv", ["before"])
    run_benchmark("demo-load", ["--sessions", "3", "--turns", "2", "--json"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["errors"] == 0 and found["crosstalk"] == 0 and found["answers"] == 6, found["first_errors"]
    assert found["own_word_read"] == 3 and found["words_of_others"] == 0 and found["different"][0] == 3
    assert 0 < found["ttft_p50"] <= found["ttft_p95"]
