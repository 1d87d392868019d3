"""The build of the packaged models: every stage, small, twice."""

import hashlib
import json
from pathlib import Path

import pytest
import torch

from regiontower.benchmarks.nano_build import Build
from regiontower.mllm import load_mllm

STEPS = 3


def build(out: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    out.mkdir()
    monkeypatch.chdir(out)  # a relative path: the packaged stage.json names its parents
    trial = Build(Path("nano"), steps=STEPS, scenes=32, threads=1, batch_size=2)
    trial.common["train.compile"] = False  # a minute of compiling that changes nothing here
    trial.run()
    return out / "nano" / "weights"


def hashes(weights: Path) -> dict[str, str]:
    files = sorted(weights.rglob("*.safetensors"))
    return {str(file.relative_to(weights)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_two_builds_are_equal_to_the_bit_and_can_be_opened(tmp_path, monkeypatch, threads):
    first, second = build(tmp_path / "a", monkeypatch), build(tmp_path / "b", monkeypatch)
    assert set(hashes(first)) == {f"{name}/model.safetensors" for name in ("nano", "nano-clip", "nano-lm")}
    assert hashes(first) == hashes(second)

    towers, lms = [], []
    for name in ("nano", "nano-clip"):
        model, _ = load_mllm(first / name, dtype="fp32")
        assert next(load_mllm(first / name)[0].parameters()).dtype == torch.bfloat16
        towers.append(model.model.vision_tower)
        lms.append(model.model.language_model)
        stage = json.loads((first / name / "stage.json").read_text())
        assert stage["stage"] == "instruct" and str(tmp_path) not in json.dumps(stage)
    assert any((a != b).any() for a, b in zip(towers[0].parameters(), towers[1].parameters(), strict=True))

    seen = []
    monkeypatch.setattr(Build, "make_lm", lambda self: seen.append("lm"))
    Build(first.parent, steps=STEPS, scenes=32, threads=1, batch_size=2).run("instruct-clip")
    assert not seen  # finished stages are left alone
