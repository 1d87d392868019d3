"""RICE as a vision tower: equal to MLCD, opens its checkpoints, gives them back."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, MLCDVisionModel

from regiontower.vision_towers import RiceVisionConfig, RiceVisionModel, TowerOutput, UserError, load_tower

BOXES = torch.tensor([[[0.0, 0, 56, 56], [14, 14, 42, 42]], [[3, 40, 20, 56], [0, 0, 9, 9]]])


def rice_like(tower: MLCDVisionModel, **fields) -> RiceVisionModel:
    """The same weights with region layers."""
    config = RiceVisionConfig.from_native(tower.config, **fields)
    model = RiceVisionModel._from_config(config, attn_implementation=tower.config._attn_implementation)
    model.load_state_dict(tower.state_dict())
    return model.eval()


def images(height: int = 56, width: int = 56) -> torch.Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(2))


def same_weights(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    one, two = first.state_dict(), second.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("height", "width"), [(56, 56), (42, 84), (98, 28)])
@pytest.mark.parametrize("boxes", [None, BOXES], ids=["plain", "boxes"])
@torch.no_grad()
def test_image_stream_is_mlcd_to_the_bit(native, attention, height, width, boxes):
    tower = native("mlcd", attention)
    asked = {"output_hidden_states": True, "output_attentions": attention == "eager"}
    expected = tower(images(height, width), **asked)
    output = rice_like(tower)(images(height, width), boxes=boxes, **asked)

    assert (output.last_hidden_state - expected.last_hidden_state).abs().max() == 0
    assert (output.pooler_output - expected.pooler_output).abs().max() == 0
    assert len(output.hidden_states) == len(expected.hidden_states) == 5
    assert all(map(torch.equal, output.hidden_states, expected.hidden_states))
    if attention == "eager":
        assert all(map(torch.equal, output.attentions, expected.attentions))
    assert (boxes is None) == (getattr(output, "region_embeds", None) is None)


@torch.no_grad()
def test_hidden_states_are_selected_as_llava_does(native):
    tower = native("mlcd")
    for asked in (-2, [1, -1], True):
        expected = tower(images(), output_hidden_states=asked).hidden_states
        states = rice_like(tower)(images(), boxes=BOXES, output_hidden_states=asked).hidden_states
        assert [state is None for state in states] == [state is None for state in expected]
        assert all(torch.equal(a, b) for a, b in zip(states, expected, strict=True) if b is not None)


@torch.no_grad()
def test_return_dict_false_gives_a_tuple(native):
    model = rice_like(native("mlcd"))
    output = model(images(), boxes=BOXES)
    assert isinstance(output, TowerOutput)
    assert torch.equal(model(images(), boxes=BOXES, return_dict=False)[-1], output.region_embeds)
    model.config.return_dict = False
    assert isinstance(model(images(), boxes=BOXES), tuple)


def write_layout(folder: Path, tower: MLCDVisionModel, model_type: str, prefix: str) -> None:
    """An MLCD directory as it is found in the wild."""
    tower.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["model_type"] = model_type
    if prefix:  # files of that age also lack the rotary settings
        config.pop("rope_parameters")
    (folder / "config.json").write_text(json.dumps(config))
    weights = load_file(folder / "model.safetensors")
    assert not any(key.startswith("vision_model.") for key in weights)
    save_file({prefix + key: value for key, value in weights.items()}, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("prefix", ["", "vision_model."])
@pytest.mark.parametrize("model_type", ["mlcd", "mlcd_vision_model"])
@torch.no_grad()
def test_every_mlcd_directory_opens_whole(native, tmp_path, model_type, prefix):
    tower = native("mlcd")
    write_layout(tmp_path / "mlcd", tower, model_type, prefix)

    model = load_tower(tmp_path / "mlcd")
    assert isinstance(model, RiceVisionModel)
    assert not model.training
    assert same_weights(model, tower)
    assert torch.equal(model(images()).last_hidden_state, tower(images()).last_hidden_state)

    model.save_pretrained(tmp_path / "ours")  # what was renamed on the way in must not come back wrong
    assert same_weights(load_tower(tmp_path / "ours"), tower)
    assert same_weights(AutoModel.from_pretrained(tmp_path / "ours"), tower)


def test_dtype_is_as_saved_or_as_asked(native, tmp_path):
    native("mlcd").to(torch.bfloat16).save_pretrained(tmp_path)
    assert load_tower(tmp_path).dtype == torch.bfloat16
    assert load_tower(tmp_path, dtype=torch.float32).dtype == torch.float32


@torch.no_grad()
def test_save_and_open_keep_region_settings_and_region_embeddings(native, tmp_path):
    model = rice_like(native("mlcd"), num_region_layers=3, region_mask_rule="overlap")
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config, RiceVisionConfig)
    assert (config.num_region_layers, config.region_mask_rule) == (3, "overlap")
    assert config.architectures == ["RiceVisionModel"]
    for reopened in (AutoModel.from_pretrained(tmp_path), load_tower(tmp_path)):
        assert isinstance(reopened, RiceVisionModel)
        assert torch.equal(reopened(images(), boxes=BOXES).region_embeds, model(images(), boxes=BOXES).region_embeds)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_to_native_saves_and_reopens_bit_equal(native, tmp_path, attention):
    model = rice_like(native("mlcd", attention))
    plain = model.to_native()
    assert type(plain) is MLCDVisionModel
    assert plain.config.model_type == "mlcd_vision_model"
    assert not hasattr(plain.config, "num_region_layers")
    assert plain.config._attn_implementation == attention
    plain.save_pretrained(tmp_path)
    reopened = MLCDVisionModel.from_pretrained(tmp_path, attn_implementation=attention)
    assert same_weights(reopened, model)
    expected = model(images(42, 84), boxes=BOXES).last_hidden_state
    assert torch.equal(plain(images(42, 84)).last_hidden_state, expected)
    assert torch.equal(reopened(images(42, 84)).last_hidden_state, expected)


def test_vit_l_14_560_has_the_published_number_of_parameters():
    config = RiceVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=560,
        patch_size=14,
    )
    with torch.device("meta"):
        model = RiceVisionModel(config)
    assert sum(weight.numel() for weight in model.parameters()) == 302_916_640
    assert model._no_split_modules == {"MLCDEncoderLayer", "RiceRegionLayer"}


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"num_region_layers": 0}, "num_region_layers"),
        ({"num_region_layers": 5}, "num_region_layers"),
        ({"region_mask_rule": "middle"}, "region_mask_rule"),
    ],
)
def test_impossible_settings_are_named(native, fields, named):
    with pytest.raises(UserError, match=named):
        RiceVisionConfig.from_native(native("mlcd").config, **fields)
