"""A card says what is in the folder, in words that run, and nothing of the machine it was written on."""

import json
import re

import pytest
import torch
import yaml

from regiontower.vision_towers import (
    CardFacts,
    RoiVisionModel,
    UserError,
    describe_tower,
    tower_image_processor,
    write_tower_card,
)

STAGE = {
    "stage": "pretrain",
    "status": "finished",
    "steps": 531,
    "samples": 8496,
    "seconds": 72.128,
    "final_loss": 43.01351501,
    "best_loss": {"loss": 42.4442, "step": 440},
    "metrics": {"object_top1": 0.35037},
    "data": {"records": "5555fd"},
    "versions": {"python": "3.11.7", "torch": "2.14.1"},
    "machine": {"system": "Linux x86_64", "cpus": 2, "device": "cpu"},
    "parents": {
        "tower": {"path": "/home/me/secret/runs/eye/", "weights_sha256": "eb6be8", "stage": {"stage": "x", "steps": 7}},
        "text": {"path": "someone/clip-base", "weights_sha256": None, "stage": None},
        "cut": {"path": "C:\\me\\secret\\cut", "weights_sha256": "aa", "stage": None},
    },
}


@pytest.fixture
def saved(native, tmp_path):
    """`saved(name)`: a tower with its image processor in a folder; "roi" is ours, others are native."""

    def save(name: str):
        tower = RoiVisionModel.from_native(native("clip")) if name == "roi" else native(name)
        tower.save_pretrained(tmp_path / name)
        tower_image_processor(tower.config).save_pretrained(tmp_path / name)
        return tmp_path / name

    return save


def parts(text: str) -> tuple[dict, dict[str, str], str]:
    """Front matter, the rows of all tables, the block of code."""
    rows = dict(re.findall(r"^\| (.+?) \| (.+) \|$", text, re.M))
    return yaml.safe_load(text.split("---\n")[1]), rows, re.findall(r"```python\n(.*?)```", text, re.S)[0]


@pytest.mark.parametrize("name", ["roi", "siglip", "dinov2"])
def test_the_code_runs_in_the_folder_and_the_rows_are_the_towers(saved, noise_image, name, monkeypatch, capsys):
    folder = saved(name)
    front, rows, block = parts(write_tower_card(folder).read_text())
    assert front["library_name"] == "transformers" and front["pipeline_tag"] == "image-feature-extraction"
    assert ("region-features" in front["tags"]) == (name == "roi") == ("region embedding" in rows)
    assert not {"license", "base_model"} & front.keys() and "custom_code" not in front["tags"]
    from transformers import AutoModel

    model = AutoModel.from_pretrained(folder)
    spec = describe_tower(model.config)
    assert rows["parameters"] == f"{sum(p.numel() for p in model.parameters()):,} (F32)"
    assert (
        rows["image token"] == f"{spec.hidden_size} wide" and f"{spec.image_size} x {spec.image_size}" in rows["input"]
    )
    monkeypatch.chdir(folder)
    noise_image().save("picture.jpg")
    exec(compile(block, "README.md", "exec"), {"__name__": "__main__"})
    assert "torch.Size([1, " in capsys.readouterr().out


def test_training_is_told_without_paths(saved):
    folder = saved("roi")
    (folder / "stage.json").write_text(json.dumps(STAGE))
    text = write_tower_card(folder).read_text()
    front, rows, _ = parts(text)
    assert front["base_model"] == "someone/clip-base"
    assert rows["steps"] == "531" and rows["final loss"] == "43.01" and rows["`object_top1`"] == "0.3504"
    assert rows["data: records"] == "sha256 `5555fd`" and rows["best loss"] == "42.44 at step 440"
    assert rows["began with: tower"] == "`eye`, weights sha256 `eb6be8`, after x of 7 steps"
    assert rows["began with: cut"] == "`cut`, weights sha256 `aa`" and rows["began with: text"] == "`someone/clip-base`"
    assert rows["versions"] == "python 3.11.7, torch 2.14.1" and "cpus 2" in rows["machine"]
    assert "secret" not in text and str(folder) not in text and "/home" not in text


def test_facts_that_no_file_knows(saved, tmp_path):
    facts = CardFacts(repo_id="someone/eye", license="apache-2.0", base_model="someone/base", run=tmp_path)
    text = write_tower_card(saved("roi"), facts).read_text()
    front, _, block = parts(text)
    assert front["license"] == "apache-2.0" and front["base_model"] == "someone/base"
    assert '\nsource = "someone/eye"\n' in block and "\n# eye\n" in text


def test_a_saved_again_model_without_its_code_is_not_said_to_bring_it(saved):
    folder = saved("roi")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModel": "modeling_gone.RoiVisionModel"}
    (folder / "config.json").write_text(json.dumps(config))
    assert "trust_remote_code" not in write_tower_card(folder).read_text()
    (folder / "modeling_gone.py").write_text("")
    front, _, block = parts(write_tower_card(folder).read_text())
    assert "trust_remote_code=True" in block and "custom_code" in front["tags"]


def test_what_is_no_model_is_refused(saved, tmp_path):
    with pytest.raises(UserError, match="no model stands in"):
        write_tower_card(tmp_path)
    folder = saved("roi")
    (folder / "stage.json").write_text("{")
    with pytest.raises(UserError, match=r"stage\.json is not valid JSON"):
        write_tower_card(folder)
    assert torch.is_grad_enabled() and not (folder / "README.md").exists()
