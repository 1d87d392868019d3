"""RoIAlign on native ViTs: the image stream is theirs, the regions are averages that can be checked by hand."""

import pytest
import torch
from transformers import AutoConfig, AutoModel

from regiontower.vision_towers import (
    RoiVisionConfig,
    RoiVisionModel,
    TowerFeatures,
    UserError,
    describe_tower,
    encode_regions,
    load_tower,
)

TOWERS = ["clip", "siglip", "siglip_headless", "mlcd", "dinov2", "dinov3", "aimv2", "aimv2_native"]
BOXES = torch.tensor([[[0.0, 0, 56, 56], [14, 14, 42, 42]], [[3, 40, 20, 56], [0, 0, 9, 9]]])


def images(count: int = 2, height: int = 56, width: int = 56) -> torch.Tensor:
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(2))


def without_registers(tokens: torch.Tensor, prefix: int) -> torch.Tensor:
    keep = [i for i in range(tokens.shape[1]) if i == 0 or i >= prefix]
    return tokens[:, keep]


def ramp_features(model: RoiVisionModel, slope_x: float, slope_y: float, level: float = 0.0) -> TowerFeatures:
    """Patch tokens whose value is linear in the patch centre's pixel position."""
    centres = (torch.arange(4) + 0.5) * 14
    value = level + slope_y * centres[:, None] + slope_x * centres[None, :]
    patches = value.flatten()[None, :, None].expand(1, 16, 32)
    prefix = torch.full((1, model.spec.num_prefix_tokens, 32), 1e6)  # must not be read
    return TowerFeatures({model.region_feature_layers[0]: torch.cat([prefix, patches], dim=1)}, (4, 4), (56, 56))


@pytest.mark.parametrize("name", TOWERS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_image_stream_is_the_native_one(native, name, attention):
    tower = native(name, attention)
    expected = tower(images(), output_hidden_states=True)
    model = RoiVisionModel.from_native(tower)
    assert model.tower.config._attn_implementation == attention
    prefix = describe_tower(tower.config).num_prefix_tokens
    for boxes in (None, BOXES):
        output = model(images(), boxes=boxes, output_hidden_states=True)
        assert torch.equal(output.last_hidden_state, without_registers(expected.last_hidden_state, prefix))
        assert len(output.hidden_states) == 5
        for mine, theirs in zip(output.hidden_states, expected.hidden_states, strict=True):
            assert torch.equal(mine, without_registers(theirs, prefix))
        if expected.pooler_output is None:
            assert output.pooler_output is None
        else:
            assert torch.equal(output.pooler_output, expected.pooler_output)
    assert output.last_hidden_state.shape[1] == 16 + describe_tower(model.config).num_prefix_tokens
    assert output.region_embeds.shape == (2, 2, 32)


@pytest.mark.parametrize("name", TOWERS)
@torch.no_grad()
def test_hidden_states_are_selected_as_llava_does(native, name):
    tower = native(name)
    model, prefix = RoiVisionModel.from_native(tower), describe_tower(tower.config).num_prefix_tokens
    for asked in (-2, [1, -2], True):
        expected = tower(images(), output_hidden_states=asked).hidden_states
        for boxes in (None, BOXES):
            states = model(images(), boxes=boxes, output_hidden_states=asked).hidden_states
            for mine, theirs in zip(states, expected, strict=True):
                assert theirs is None or torch.equal(mine, without_registers(theirs, prefix))
    assert model(images(), boxes=BOXES).hidden_states is None
    model.config.output_hidden_states = True
    assert len(model(images()).hidden_states) == 5


@pytest.mark.parametrize("name", ["clip", "siglip", "dinov2"])
@torch.no_grad()
def test_a_tower_whose_own_size_is_no_multiple_of_the_patch(native, name, tmp_path):
    """As SigLIP so400m/14 at 384 px: what is left over at the right and at the bottom is seen by no patch."""
    native(name, image_size=60).save_pretrained(tmp_path)
    model = load_tower(tmp_path)
    assert describe_tower(model.config).image_size == 60
    pixels = images(height=60, width=60)
    output = model(pixels, boxes=BOXES)
    assert output.last_hidden_state.shape[1] == 16 + model.spec.num_prefix_tokens
    pixels[..., 56:], pixels[..., 56:, :] = 9, 9
    assert torch.equal(model(pixels, boxes=BOXES).region_embeds, output.region_embeds)
    model = RoiVisionModel.from_native(native("siglip", image_size=60))
    features = TowerFeatures({4: ramp_features(model, 0.5, -2.0, 3.0).hidden[4]}, (4, 4), (60, 60))
    found = model(features=features, boxes=torch.tensor([[[10.0, 20, 40, 30]]])).region_embeds[0, 0, 0]
    torch.testing.assert_close(found, torch.tensor(3.0 + 0.5 * 25 - 2.0 * 25), atol=1e-3, rtol=1e-4)


@torch.no_grad()
def test_return_dict_false_gives_a_tuple(native):
    model = RoiVisionModel.from_native(native("clip"))
    embeds = model(images(), boxes=BOXES).region_embeds
    assert torch.equal(model(images(), boxes=BOXES, return_dict=False)[-1], embeds)


@pytest.mark.parametrize("name", ["clip", "siglip", "dinov3"])
def test_a_constant_map_gives_that_constant(native, name):
    model = RoiVisionModel.from_native(native(name))
    boxes = torch.tensor([[[0.0, 0, 56, 56], [1, 2, 3, 4], [50, 50, 56, 56], [20, 20, 20, 20]]])
    embeds = model(features=ramp_features(model, 0, 0, 2.5), boxes=boxes).region_embeds
    torch.testing.assert_close(embeds, torch.full((1, 4, 32), 2.5))


@pytest.mark.parametrize("roi_size", [1, 3, 7])
def test_a_ramp_gives_the_value_at_the_box_centre(native, roi_size):
    model = RoiVisionModel.from_native(native("siglip"), roi_size=roi_size)
    boxes = torch.tensor(
        [[[7.0, 7, 49, 49], [10, 20, 40, 30], [21, 21, 23, 25], [30, 9, 30, 9]]]
    )  # clear of the border
    embeds = model(features=ramp_features(model, 0.5, -2.0, 3.0), boxes=boxes).region_embeds[0, :, 0]
    centre_x, centre_y = (boxes[0, :, 0] + boxes[0, :, 2]) / 2, (boxes[0, :, 1] + boxes[0, :, 3]) / 2
    torch.testing.assert_close(embeds, 3.0 + 0.5 * centre_x - 2.0 * centre_y, atol=1e-3, rtol=1e-4)


@torch.no_grad()
def test_padding_rows_are_zero_and_lists_equal_one_by_one(native):
    model = RoiVisionModel.from_native(native("clip"))
    lists = [BOXES[0, :0], BOXES[0, :1], BOXES[1]]
    pixels = images(3)
    embeds = encode_regions(model, pixels, lists)
    assert [len(rows) for rows in embeds] == [0, 1, 2]
    for row, boxes in enumerate(lists):
        (alone,) = encode_regions(model, pixels[row : row + 1], [boxes])
        torch.testing.assert_close(embeds[row], alone, atol=1e-5, rtol=1e-5)
    padded = model(pixels[:2], boxes=BOXES, region_counts=torch.tensor([1, 0])).region_embeds
    assert padded[0, 0].abs().max() > 0
    assert padded[0, 1].abs().max() == 0 and padded[1].abs().max() == 0
    assert model(pixels, boxes=torch.zeros(3, 0, 4)).region_embeds.shape == (3, 0, 32)


@pytest.mark.parametrize("name", ["clip", "dinov3"])
@pytest.mark.parametrize("layer", [-1, -2, 1])
@torch.no_grad()
def test_kept_features_give_the_same_regions(native, name, layer):
    model = RoiVisionModel.from_native(native(name), region_layer=layer)
    output = model(images(), boxes=BOXES, output_hidden_states=list(model.region_feature_layers))
    features = TowerFeatures.from_output(output, (56, 56), 14)
    assert torch.equal(model(features=features, boxes=BOXES).region_embeds, output.region_embeds)


@pytest.mark.parametrize("name", TOWERS)
@torch.no_grad()
def test_save_and_open(native, tmp_path, name):
    tower = native(name)
    tower.save_pretrained(tmp_path / "native")
    model = load_tower(tmp_path / "native", readout="roi")
    assert isinstance(model, RoiVisionModel)
    assert model.tower.config._attn_implementation == "sdpa"
    expected = RoiVisionModel.from_native(tower)(images(), boxes=BOXES)
    model.save_pretrained(tmp_path / "ours")
    assert isinstance(AutoConfig.from_pretrained(tmp_path / "ours"), RoiVisionConfig)
    for reopened in (model, load_tower(tmp_path / "ours"), AutoModel.from_pretrained(tmp_path / "ours")):
        output = reopened(images(), boxes=BOXES)
        assert torch.equal(output.last_hidden_state, expected.last_hidden_state)
        assert torch.equal(output.region_embeds, expected.region_embeds)
        assert reopened.tower.config is reopened.config.tower_config


@torch.no_grad()
def test_settings_survive_saving(native, tmp_path):
    RoiVisionModel.from_native(native("clip"), region_layer=-2, roi_size=3).save_pretrained(tmp_path)
    config = load_tower(tmp_path).config
    assert (config.region_layer, config.roi_size) == (-2, 3)
    assert (config.hidden_size, config.image_size, config.patch_size, config.num_hidden_layers) == (32, 56, 14, 4)


@torch.no_grad()
def test_wrapping_never_touches_the_weights(native):
    """Weights assigned to a module built without memory carry no mark that they are initialised."""
    tower = native("mlcd")
    with torch.device("meta"):
        hollow = type(tower)(tower.config)
    hollow.load_state_dict(tower.state_dict(), assign=True)
    wrapped = RoiVisionModel.from_native(hollow)
    assert all(torch.equal(value, tower.state_dict()[key]) for key, value in wrapped.tower.state_dict().items())
    assert wrapped.to_native() is hollow


def test_gradients_and_checkpointing(native):
    gradients = []
    for checkpointing in (False, True):
        model = RoiVisionModel.from_native(native("clip")).train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        model(images(), boxes=BOXES).region_embeds.square().sum().backward()
        gradients.append({name: weight.grad for name, weight in model.named_parameters()})
    untouched = {name for name, gradient in gradients[0].items() if gradient is None}
    assert untouched == {"tower.post_layernorm.weight", "tower.post_layernorm.bias"}
    assert all(torch.equal(gradients[1][name], g) for name, g in gradients[0].items() if g is not None)


def test_half_precision_weights_work_and_half_precision_boxes_are_refused(native):
    model = RoiVisionModel.from_native(native("clip").to(torch.bfloat16))
    pixels = images().to(torch.bfloat16)
    assert model(pixels, boxes=BOXES).region_embeds.dtype == torch.bfloat16
    with pytest.raises(UserError, match="float32"):
        model(pixels, boxes=BOXES.to(torch.bfloat16))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"boxes": BOXES[0]}, "boxes must be"),
        ({"boxes": BOXES, "region_counts": torch.ones(3)}, "region_counts must be"),
        ({"boxes": BOXES, "pixel_values": None}, "pixel_values"),
        ({"boxes": BOXES, "features": TowerFeatures({}, (4, 4), (56, 56))}, "hidden state 4"),
        ({"features": TowerFeatures({4: torch.zeros(2, 17, 32)}, (4, 4), (56, 56))}, "features need boxes"),
    ],
)
def test_wrong_input_is_one_sentence(native, arguments, named):
    with pytest.raises(UserError, match=named) as caught:
        RoiVisionModel.from_native(native("clip"))(**({"pixel_values": images()} | arguments))
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("fields", [{"region_layer": 5}, {"region_layer": -6}, {"roi_size": 0}])
def test_impossible_settings_are_named(native, fields):
    with pytest.raises(UserError, match=next(iter(fields))):
        RoiVisionConfig(tower_config=native("clip").config, **fields)
