"""Packaged names, and towers read out of a LLaVA."""

import subprocess
import sys

import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    SiglipVisionConfig,
)

from regiontower.vision_towers import RiceVisionConfig, RiceVisionModel, load_tower, packaged


@pytest.fixture
def weights(tmp_path, monkeypatch):
    """A package with one model, called `tiny`."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    tower = RiceVisionModel(RiceVisionConfig(**sizes, patch_size=14, image_size=56))
    tower.save_pretrained(tmp_path / "weights" / "tiny")
    (tmp_path / "weights" / "notes").mkdir()
    monkeypatch.setattr(packaged, "WEIGHTS_FOLDER", tmp_path / "weights")
    return tower


def test_a_packaged_name_is_a_folder_of_the_package(weights, tmp_path, monkeypatch):
    assert packaged.packaged_models() == ("tiny",)
    assert packaged.model_source("tiny") == str(tmp_path / "weights" / "tiny")
    for other in ("./tiny", "notes", "someone/tiny"):
        assert packaged.model_source(other) == other
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").mkdir()  # a folder of that name does not hide it
    for key, tensor in load_tower("tiny").state_dict().items():
        assert torch.equal(tensor, weights.state_dict()[key])


def test_without_weights_there_are_no_names(tmp_path, monkeypatch):
    monkeypatch.setattr(packaged, "WEIGHTS_FOLDER", tmp_path / "absent")
    assert packaged.packaged_models() == ()


def test_a_tower_is_read_out_of_the_mllm_that_holds_it(tiny_mllm, tiny_mllm_dir, tmp_path):
    """In the layout of files and in that of memory, and in a process that has never heard of the whole model."""
    model, _ = tiny_mllm
    model.save_pretrained(tmp_path / "memory", save_original_format=False)
    held = model.model.vision_tower.state_dict()
    for folder in (tiny_mllm_dir, tmp_path / "memory"):
        found = load_tower(folder).state_dict()
        assert found.keys() == held.keys() and all(torch.equal(found[key], held[key]) for key in held)
    code = (
        "import sys; from regiontower.vision_towers import load_tower\n"
        f"tower = load_tower({str(tiny_mllm_dir)!r})\n"
        "assert 'regiontower.mllm' not in sys.modules\n"
        "print(type(tower).__name__)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["RiceVisionModel"]


def test_a_tower_read_out_of_an_mllm_can_be_saved_and_opened_again(tiny_mllm_dir, tmp_path):
    tower = load_tower(tiny_mllm_dir)
    tower.save_pretrained(tmp_path / "tower")
    again = load_tower(tmp_path / "tower").state_dict()
    assert again.keys() == tower.state_dict().keys()
    assert all(torch.equal(tensor, again[key]) for key, tensor in tower.state_dict().items())


@pytest.mark.parametrize("inside", [CLIPVisionConfig, SiglipVisionConfig])
@pytest.mark.parametrize("original_format", [True, False])
def test_a_native_tower_read_out_of_a_llava_can_be_saved_and_opened_again(inside, original_format, tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = inside(**sizes, image_size=28, patch_size=14)
    language = LlamaConfig(**sizes, vocab_size=64)
    llava = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=language, image_token_index=63))
    llava.save_pretrained(tmp_path / "llava", save_original_format=original_format)
    tower = load_tower(tmp_path / "llava")
    pixels = torch.randn(1, 3, 28, 28)
    for name, model in (("wrapped", tower), ("native", tower.to_native())):
        model.save_pretrained(tmp_path / name)
        again = load_tower(tmp_path / name)
        assert torch.equal(tower(pixels).last_hidden_state, again(pixels).last_hidden_state)
    held = llava.model.vision_tower(pixels).last_hidden_state
    assert torch.equal(tower(pixels).last_hidden_state, held)
