"""A LoRA run directory is given to `chat`, `eval` and the demo as any other model is."""

import json

import pytest
import torch
from typer.testing import CliRunner

from regiontower.cli import app
from regiontower.mllm import ChatSession, export_merged, load_mllm
from regiontower.mllm.adapters import has_adapter, write_adapter
from regiontower.train_stages.lora import LoraRecipe, add_lora
from regiontower.train_stages.scenes import write_scenes

QUESTION, BOX = "What is in <region>?", (10, 10, 90, 60)


@pytest.fixture(scope="module")
def runs(make_tiny_mllm, tmp_path_factory):
    """`base`, `lora` (an adapter of it that changes its answers) and `merged`, one checkpoint of both."""
    folder = tmp_path_factory.mktemp("runs")
    model, processor = make_tiny_mllm()
    for part in (model, processor):
        part.save_pretrained(folder / "base")
    add_lora(model, LoraRecipe(rank=4))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    (folder / "lora").mkdir()
    write_adapter(model, folder / "lora", str(folder / "base"), [])
    processor.save_pretrained(folder / "lora")
    export_merged(folder / "lora", folder / "merged")
    return folder


def command(*words):
    done = CliRunner().invoke(app, [*map(str, words), "--json"])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout.splitlines()[-1])


def test_chat(runs, noise_image, tmp_path):
    noise_image().save(tmp_path / "picture.png")
    box = ("--box", ",".join(map(str, BOX)))
    answers = {
        name: command("chat", tmp_path / "picture.png", QUESTION, *box, "--model", runs / name, "--max-new-tokens", 8)
        for name in ("base", "lora", "merged")
    }
    assert answers["lora"]["answer"] == answers["merged"]["answer"] != answers["base"]["answer"]


def test_eval(runs, tmp_path):
    pytest.importorskip(
        "lmms_eval", exc_type=ImportError, reason="lmms-eval is not installed (pip install 'regiontower[eval]')"
    )
    scenes = write_scenes(tmp_path / "scenes", 2, 0, preset="easy", progress=False)
    said = {}
    for name in ("base", "lora", "merged"):
        data = ("--data", scenes, "--tasks", "referring", "--limit", 2, "--out", tmp_path / name)
        found = command("eval", runs / name, *data)
        assert found["tasks"]["regiontower_referring"]["n"] == 2
        lines = (tmp_path / name / "samples_regiontower_referring.jsonl").read_text().splitlines()
        said[name] = [json.loads(line)["answer"] for line in lines]
    assert said["lora"] == said["merged"] != said["base"]


def test_the_demo(runs, noise_image):
    pytest.importorskip("gradio", reason="gradio is not installed (pip install 'regiontower[demo]')")
    from regiontower.demo.models import load_models

    (opened,) = load_models([runs / "lora"], device="cpu")
    merged, processor = load_mllm(runs / "merged", device="cpu")
    assert has_adapter(opened.model) and opened.summary()["parameters"] > 0
    picture = noise_image()
    told = [
        ChatSession(model, its, picture, max_new_tokens=8).ask(QUESTION, [BOX]).text
        for model, its in ((opened.model, opened.processor), (merged, processor))
    ]
    assert told[0] == told[1]
