"""The build of the packaged models: every stage, small, twice."""

import hashlib
import json
from pathlib import Path

import pytest
import torch

from regiontower.benchmarks import nano_build
from regiontower.benchmarks.nano_build import Build
from regiontower.mllm import load_mllm

STEPS = 2


def build(out: Path, monkeypatch: pytest.MonkeyPatch, until: str = "weights") -> Path:
    out.mkdir()
    monkeypatch.chdir(out)  # a relative path: the packaged stage.json names its parents
    trial = Build(Path("nano"), steps=STEPS, scenes=24, threads=1, batch_size=2)
    trial.common["train.compile"] = False  # a minute of compiling that changes nothing here
    trial.run(until)
    return out / "nano"


def hashes(runs: Path) -> dict[str, str]:
    """Of the weights that each finished run holds."""
    return {run.name: hashlib.sha256((run / "model.safetensors").read_bytes()).hexdigest() for run in runs.iterdir()}


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_two_builds_are_equal_to_the_bit_and_can_be_opened(tmp_path, monkeypatch, threads):
    nano = build(tmp_path / "a", monkeypatch)
    # The stages after these are the same functions again, and equal to the bit by the tests of their own.
    again = hashes(build(tmp_path / "b", monkeypatch, until="align") / "runs")
    assert {"clip", "rice", "lm", "align"} <= set(again)
    assert again == {name: found for name, found in hashes(nano / "runs").items() if name in again}
    first = nano / "weights"
    assert {folder.name for folder in first.iterdir()} == {"nano", "nano-clip", "nano-lm"}

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
    monkeypatch.setitem(nano_build.STAGES, "lm", lambda build: seen.append("lm"))
    Build(first.parent, steps=STEPS, scenes=24, threads=1, batch_size=2).run("instruct-clip")
    assert not seen  # finished stages are left alone
