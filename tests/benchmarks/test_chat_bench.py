"""`bench chat` measures two arms that say the same."""

import json

import pytest

from regiontower.benchmarks import run_benchmark
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
