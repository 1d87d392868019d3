"""The build of the packaged models: every stage, small, twice."""

import hashlib
import json
from pathlib import Path

import pytest
import torch

from regiontower.benchmarks import nano_build
from regiontower.benchmarks.nano_build import Build
from regiontower.mllm import load_mllm
from regiontower.vision_towers import load_tower

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


@pytest.mark.slow
def test_two_builds_are_equal_to_the_bit(tmp_path, monkeypatch, threads):
    first, again = (hashes(build(tmp_path / name, monkeypatch) / "runs") for name in "ab")
    assert {"clip", "rice", "lm", "align", "instruct-last"} <= set(first)
    assert first == again


def test_every_stage_is_built_and_the_models_can_be_opened(tmp_path, monkeypatch, threads):
    first = build(tmp_path / "a", monkeypatch) / "weights"
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
    again = Build(first.parent, steps=STEPS, scenes=24, threads=1, batch_size=2)
    again.common["train.compile"] = False
    again.run("instruct-last-clip", rows=True)
    assert not seen  # finished stages are left alone

    control, unfrozen = tower_of(first / "nano-clip"), tower_of(again.run_dir("unfrozen"))
    assert any((a != b).any() for a, b in zip(control.parameters(), unfrozen.parameters(), strict=True))
    learned, inside = load_tower(again.run_dir("rice-labels")), tower_of(again.run_dir("labels"))
    for a, b in zip(learned.parameters(), inside.parameters(), strict=True):
        assert torch.equal(a.float(), b.float())


def tower_of(folder: Path):
    return load_mllm(folder, dtype="fp32")[0].model.vision_tower
