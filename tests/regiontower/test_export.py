"""`regiontower export` as a user types it."""

import json
import re
import sys
from pathlib import Path

import pytest
from transformers import CLIPVisionConfig, CLIPVisionModel

from regiontower import export as export_module
from regiontower.cli import main

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "export.md").read_text(encoding="utf-8")


@pytest.fixture
def run(monkeypatch, capsys):
    """`run(*arguments)` -> (status, stdout, stderr) of `regiontower export`, in this process."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["regiontower", "export", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        return stopped.value.code, *capsys.readouterr()

    return call


@pytest.fixture(scope="module")
def clip_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=56, patch_size=14)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("model", "form", "kind", "file"),
    [
        ("clip", "remote-code", "roi_vision_model", "modeling_roi_vision_model.py"),
        ("clip", "native", "clip_vision_model", "preprocessor_config.json"),
        ("mllm", "plain-llava", "llava", "processor_config.json"),
        ("mllm", "remote-code", "region_llava", "modeling_region_llava.py"),
    ],
)
def test_each_form(run, clip_dir, tiny_mllm_dir, tmp_path, model, form, kind, file):
    source = {"clip": clip_dir, "mllm": tiny_mllm_dir}[model]
    status, output, _ = run(source, "--out", tmp_path / "out", "--as", form, "--license", "mit", "--json")
    said = json.loads(output.strip().splitlines()[-1])
    assert status == 0 and said["type"] == kind and said["form"] == form and said["address"] is None
    assert {file, "README.md", "model.safetensors"} <= set(said["files"])
    assert any(name.startswith("modeling_") for name in said["files"]) == (form == "remote-code")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "license: mit" in card and str(source) not in card and "base_model" not in card


def test_uploads_only_when_asked_to(run, clip_dir, tmp_path, monkeypatch):
    sent = []
    monkeypatch.setattr(export_module, "push_folder", lambda *a, **k: sent.append((a, k)) or "https://hub.test/x/y")
    assert run(clip_dir, "--out", tmp_path / "one")[0] == 0 and not sent
    status, output, _ = run(
        clip_dir, "--out", tmp_path / "two", "--push-to-hub", "x/y", "--private", "--revision", "v1"
    )
    assert status == 0 and "https://hub.test/x/y" in output
    assert sent == [((tmp_path / "two", "x/y"), {"private": True, "revision": "v1"})]
    assert 'source = "x/y"' in (tmp_path / "two" / "README.md").read_text()


def test_mistakes_are_one_line_and_write_nothing(run, clip_dir, tiny_mllm_dir, tmp_path):
    out = tmp_path / "out"
    cases = {
        "--as must be": (clip_dir, "--as", "gguf"),
        "use --as plain-llava": (tiny_mllm_dir, "--as", "native"),
        "only a region_llava": (clip_dir, "--as", "plain-llava"),
        "give --push-to-hub": (clip_dir, "--private"),
        "no model can be opened": (tmp_path / "nothing",),
    }
    for words, arguments in cases.items():
        status, _, said = run(*arguments, "--out", out)
        assert status == 1 and words in said and said.count("\n") == 1 and "Traceback" not in said, said
        assert not out.exists()


def test_the_page_runs_and_names_every_form(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for block in re.findall(r"^```python\n(.*?)^```", PAGE, flags=re.M | re.S):
        exec(compile(block, "docs/export.md", "exec"), {"__name__": "__main__"})
    assert list(tmp_path.glob("eye/modeling_*.py"))
    assert all(f"`{form}`" in PAGE for form in export_module.FORMS)
