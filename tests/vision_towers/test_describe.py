"""What is said about towers agrees with what they do; what cannot be opened is one sentence."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    Aimv2Config,
    Aimv2Model,
    AutoImageProcessor,
    BertConfig,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    SiglipConfig,
    SiglipModel,
)
from transformers.utils import logging

from regiontower.vision_towers import (
    RiceVisionConfig,
    RiceVisionModel,
    RoiVisionConfig,
    RoiVisionModel,
    UserError,
    describe,
    describe_tower,
    load_tower,
    register_tower,
    registered_towers,
    tower_image_processor,
)

TOWERS = ["clip", "siglip", "siglip_headless", "mlcd", "dinov2", "dinov3", "aimv2", "aimv2_native"]
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 64,
    "eos_token_id": 2,
    "bos_token_id": 1,
}


def refused(act, *named: str) -> None:
    """`act()` raises a UserError of one line that names all of `named`."""
    with pytest.raises(UserError) as caught:
        act()
    message = str(caught.value)
    assert len(message.splitlines()) == 1 and message.endswith("."), message
    assert all(name in message for name in named), message


@pytest.mark.parametrize("name", TOWERS)
@torch.no_grad()
def test_a_spec_is_what_the_model_does(native, name):
    tower = native(name)
    spec = describe_tower(tower.config)
    states = tower(torch.zeros(1, 3, 56, 56), output_hidden_states=True).hidden_states
    tokens = states[spec.default_feature_layer]
    rows, columns = spec.grid(56, 56)
    assert (spec.hidden_size, spec.patch_size, spec.image_size) == (tokens.shape[-1], 14, 56)
    assert spec.num_prefix_tokens == tokens.shape[1] - rows * columns
    assert (spec.region_dim, spec.region_readout) == (0, "none")
    assert (spec.positions == "learned") == any("position_embedding" in key for key in tower.state_dict())
    assert len(spec.image_mean) == len(spec.image_std) == 3

    odd = torch.zeros(1, 3, 42, 84)
    if spec.any_resolution:
        assert tower(odd).last_hidden_state.shape[1] == 18 + spec.num_prefix_tokens
    else:
        with pytest.raises((RuntimeError, ValueError)):
            tower(odd)


@pytest.mark.parametrize("name", TOWERS)
@torch.no_grad()
def test_our_towers_are_described_too(native, name):
    tower = native(name)
    inner = describe_tower(tower.config)
    config = RoiVisionConfig(tower_config=tower.config)
    spec = describe_tower(config)
    assert (spec.region_readout, spec.region_dim) == ("roi", 32)
    assert spec.num_prefix_tokens == min(1, inner.num_prefix_tokens)
    assert spec.select_strategy == ("default" if inner.num_prefix_tokens else "full")
    assert spec == replace(inner, region_readout="roi", region_dim=32, num_prefix_tokens=spec.num_prefix_tokens)


def test_rice_is_described_as_its_native_tower_with_regions(native):
    config = native("mlcd").config
    assert describe_tower(RiceVisionConfig.from_native(config)) == replace(
        describe_tower(config), region_readout="rice", region_dim=32
    )


def test_towers_are_registered_once_and_by_exact_type(native, monkeypatch):
    monkeypatch.setattr(describe, "_REGISTRY", registered_towers())
    config = native("clip").config
    refused(lambda: register_tower("clip_vision_model", describe_tower), "clip_vision_model")
    refused(lambda: describe_tower(BertConfig()), "'bert'", "clip_vision_model", "register_tower")
    spec = describe_tower(config)
    register_tower("bert", lambda _: spec)
    assert describe_tower(BertConfig()) is spec
    registered_towers().clear()
    assert describe_tower(config) == spec  # what was handed out is a copy


def test_sides_that_are_not_square_are_refused(native):
    refused(lambda: describe_tower(native("siglip").config.__class__(image_size=[56, 28])), "[56, 28]")
    assert describe_tower(native("siglip").config.__class__(image_size=[56, 56], patch_size=[14, 14])).patch_size == 14


def write_native(native, folder: Path, name: str = "mlcd") -> Path:
    native(name).save_pretrained(folder)
    return folder


def edit_config(folder: Path, **fields) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


def test_what_is_no_tower_is_one_sentence(native, tmp_path):
    (tmp_path / "empty").mkdir()
    refused(lambda: load_tower(tmp_path / "empty"), "empty")
    refused(lambda: load_tower(tmp_path / "absent"), "absent")

    BertConfig().save_pretrained(tmp_path / "bert")
    refused(lambda: load_tower(tmp_path / "bert"), "'bert'", "register_tower")

    folder = write_native(native, tmp_path / "broken")
    edit_config(folder, hidden_size="wide")
    refused(lambda: load_tower(folder), "hidden_size")
    (folder / "config.json").write_text("{")
    refused(lambda: load_tower(folder), "JSON")


def test_weights_that_do_not_fit_are_one_sentence(native, tmp_path):
    folder = write_native(native, tmp_path / "part")
    weights = load_file(folder / "model.safetensors")
    for name in ("class_pos_emb", "post_layernorm.weight"):
        weights.pop(name)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    refused(lambda: load_tower(folder), "lacks 2 tensors", "class_pos_emb")
    refused(lambda: load_tower(folder, readout="roi"), "lacks 2 tensors")

    folder = write_native(native, tmp_path / "shape")
    edit_config(folder, intermediate_size=128)
    refused(lambda: load_tower(folder), "another shape", "mlp.fc1")

    (folder / "model.safetensors").write_bytes(b"not weights")
    refused(lambda: load_tower(folder), "cannot be opened")
    (folder / "model.safetensors").unlink()
    refused(lambda: load_tower(folder), "model.safetensors")
    torch.save(weights, folder / "pytorch_model.bin")  # pickles are not opened
    refused(lambda: load_tower(folder), "model.safetensors")


def test_a_readout_that_cannot_be_had_is_one_sentence(native, tmp_path):
    clip = write_native(native, tmp_path / "clip", "clip")
    refused(lambda: load_tower(clip, readout="rice"), "mlcd_vision_model", "clip_vision_model")
    refused(lambda: load_tower(clip, readout="crop"), "'crop'", "rice, roi")
    mlcd = write_native(native, tmp_path / "mlcd")
    load_tower(mlcd).save_pretrained(tmp_path / "rice")
    refused(lambda: load_tower(tmp_path / "rice", readout="roi"), "rice_vision_model", "to_native")
    assert isinstance(load_tower(tmp_path / "rice", readout="rice"), RiceVisionModel)


@pytest.mark.parametrize(
    ("model_class", "config_class", "text"),
    [
        (CLIPModel, CLIPConfig, TEXT),
        (SiglipModel, SiglipConfig, TEXT | {"projection_size": 32}),
        (Aimv2Model, Aimv2Config, {k: v for k, v in TEXT.items() if k != "bos_token_id"}),
    ],
)
@torch.no_grad()
def test_a_model_with_a_vision_part_gives_that_part(native, tmp_path, model_class, config_class, text):
    vision = native("clip").config.to_dict()
    sizes = {key: vision[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "image_size")}
    sizes |= {"num_attention_heads": 2, "patch_size": 14}
    whole = model_class(config_class(vision_config=sizes, text_config=text)).eval()
    whole.save_pretrained(tmp_path / "whole")
    pixels = torch.randn(1, 3, 56, 56)
    expected = whole.vision_model(pixels).last_hidden_state
    reopened = model_class.from_pretrained(tmp_path / "whole").state_dict()  # our key maps leave the whole model alone
    assert all(torch.equal(value, reopened[key]) for key, value in whole.state_dict().items())

    tower = load_tower(tmp_path / "whole")
    assert isinstance(tower, RoiVisionModel)
    assert torch.equal(tower(pixels).last_hidden_state, expected)
    tower.save_pretrained(tmp_path / "part")
    assert torch.equal(load_tower(tmp_path / "part")(pixels).last_hidden_state, expected)


@pytest.mark.parametrize("level", [logging.INFO, logging.WARNING])
def test_opening_a_tower_says_nothing_and_leaves_settings_alone(native, tmp_path, capfd, level):
    write_native(native, tmp_path / "mlcd")
    load_tower(tmp_path / "mlcd", readout="roi").save_pretrained(tmp_path / "roi")
    (weights := load_file(tmp_path / "mlcd" / "model.safetensors"))["spare"] = torch.zeros(1)
    save_file(weights, tmp_path / "mlcd" / "model.safetensors", {"format": "pt"})
    before = logging.get_verbosity()
    logging.set_verbosity(level)
    capfd.readouterr()
    try:
        load_tower(tmp_path / "mlcd")
        load_tower(tmp_path / "roi")
        with pytest.raises(UserError):
            load_tower(tmp_path)
        assert capfd.readouterr() == ("", "")
        assert logging.get_verbosity() == level
        assert logging.is_progress_bar_enabled()
    finally:
        logging.set_verbosity(before)


@pytest.mark.parametrize("readout", ["rice", "roi"])
def test_a_tower_directory_opens_with_its_image_processor(native, tmp_path, capfd, readout):
    write_native(native, tmp_path / "mlcd")
    tower = load_tower(tmp_path / "mlcd", readout=readout)
    tower.save_pretrained(tmp_path / "ours")
    tower_image_processor(tower.config).save_pretrained(tmp_path / "ours")
    capfd.readouterr()
    processor = AutoImageProcessor.from_pretrained(tmp_path / "ours")
    assert capfd.readouterr() == ("", "")
    assert isinstance(processor, CLIPImageProcessor)

    spec = describe_tower(tower.config)
    assert dict(processor.size) == {"height": 56, "width": 56}
    assert tuple(processor.image_mean) == spec.image_mean
    assert tuple(processor.image_std) == spec.image_std
    generator = torch.Generator().manual_seed(5)
    raster = torch.randint(0, 256, (56, 56, 3), generator=generator, dtype=torch.uint8)
    pixels = processor(Image.fromarray(raster.numpy()), return_tensors="pt").pixel_values[0]
    expected = (raster.permute(2, 0, 1) / 255 - torch.tensor(spec.image_mean).view(3, 1, 1)) / torch.tensor(
        spec.image_std
    ).view(3, 1, 1)
    torch.testing.assert_close(pixels, expected)  # a square of the tower's side passes through unresized
    wide = processor(Image.new("RGB", (90, 30)), return_tensors="pt").pixel_values
    assert wide.shape == (1, 3, 56, 56)  # nothing cropped
