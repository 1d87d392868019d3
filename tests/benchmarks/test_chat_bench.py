"""`bench chat` measures two arms that say the same, and `bench demo-load` notices what it is there to notice."""

import json

import pytest

from regiontower.benchmarks import demo_load, run_benchmark
from regiontower.benchmarks.demo_load import Talk, scenes_with_words, summary
from regiontower.vision_towers.packaged import packaged_models

if "nano" not in packaged_models():
    pytest.skip("the packaged model is not here", allow_module_level=True)


def test_both_models_are_measured_and_both_arms_of_nano_say_the_same(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["before"])
    run_benchmark("chat", ["--small", "--rounds", "2", "--threads", "1", "--json"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    for name, image_tokens in (("nano", 64), ("smol", 9)):
        assert found[name]["ttft_ratio"] > 0 and found[name]["image_tokens"] == image_tokens
    assert found["nano"]["same_first_token"] == 2


def test_a_few_programs_at_once_hear_nothing_of_each_other(capsys, monkeypatch):
    pytest.importorskip("gradio", reason="Gradio is not installed (extra: demo)")
    monkeypatch.setattr("sys.argv", ["before"])
    run_benchmark("demo-load", ["--sessions", "3", "--turns", "2", "--json"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["errors"] == 0 and found["crosstalk"] == 0 and found["answers"] == 6, found["first_errors"]
    assert 0 < found["ttft_p50"] <= found["ttft_p95"]


def test_pictures_hold_words_of_their_own():
    words = [word for _, word in scenes_with_words(5)]
    assert len(set(words)) == 5
    assert all(len([r for r in scene.record.regions if r.ocr]) == 1 for scene, _ in scenes_with_words(3))


def test_crosstalk_and_errors_are_counted():
    alone = [Talk(["house", "a sign"], [0.1, 0.1]), Talk(["river", "a sign"], [0.1, 0.1])]
    mixed = [Talk(["river", "a sign"], [0.2, 0.4]), Talk(["river"], [0.6], ["RuntimeError: x"])]
    found = summary(["house", "river"], alone, mixed)
    assert (found["crosstalk"], found["words_of_others"], found["errors"], found["own_word_read"]) == (1, 1, 1, 1)
    assert found["ttft_p50"] == 0.4 and demo_load.FIRST_SEED > 1_000_000
