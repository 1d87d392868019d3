"""CLOC's tower: the native image stream, regions and texts by the Prompter."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, AutoModel

from regiontower.vision_towers import (
    ClocVisionConfig,
    ClocVisionModel,
    RoiVisionModel,
    TowerFeatures,
    UserError,
    describe_tower,
    encode_regions,
    load_tower,
)
from regiontower.vision_towers.positions import grid_centres

BOXES = torch.tensor([[[0.0, 0, 56, 56], [14, 14, 42, 42]], [[3, 40, 20, 56], [0, 0, 0, 0]]])
COUNTS = torch.tensor([2, 1])


def images() -> torch.Tensor:
    return torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(2))


def texts() -> torch.Tensor:
    return torch.randn(2, 3, 24, generator=torch.Generator().manual_seed(3))


@pytest.fixture(params=["clip", "siglip", "mlcd", "dinov3"])
def model(request, native) -> ClocVisionModel:
    return ClocVisionModel.from_native(native(request.param), projection_dim=24)


@torch.no_grad()
def test_the_image_stream_is_the_native_one_and_padding_is_zero(model):
    alone, output = model(images()), model(images(), boxes=BOXES, region_counts=COUNTS)
    assert torch.equal(alone.last_hidden_state, output.last_hidden_state)
    assert alone.region_embeds is None and output.region_embeds.shape == (2, 2, 32)
    assert not output.region_embeds[1, 1].any() and output.region_embeds[1, 0].any()
    one_by_one = encode_regions(model, images(), [BOXES[0], BOXES[1, :1]])
    torch.testing.assert_close(output.region_embeds[0], one_by_one[0])
    torch.testing.assert_close(output.region_embeds[1, :1], one_by_one[1])


@torch.no_grad()
def test_another_box_is_another_embedding_and_the_frame_counts(model):
    output = model(images(), boxes=BOXES)
    assert (output.region_embeds[0, 0] - output.region_embeds[0, 1]).abs().max() > 1e-4
    # The same tokens, as if of an input with sides twice as long: nothing but the frame differs.
    small = TowerFeatures.from_output(model(images(), output_hidden_states=True), (56, 56), model.config.patch_size)
    large = replace(small, input_hw=(112, 112))
    moved = model(features=large, boxes=BOXES).region_embeds
    assert (moved - output.region_embeds)[0].abs().amax(dim=-1).min() > 1e-4
    if not model.prompter.add_token_pos:  # else the tokens have moved, too
        torch.testing.assert_close(model(features=large, boxes=2 * BOXES).region_embeds, output.region_embeds)


@torch.no_grad()
def test_features_of_an_earlier_call_give_the_same(model):
    first = model(images(), output_hidden_states=True)
    features = TowerFeatures.from_output(first, (56, 56), model.config.patch_size)
    boxes = model(images(), boxes=BOXES, region_counts=COUNTS).region_embeds
    assert torch.equal(model(features=features, boxes=BOXES, region_counts=COUNTS).region_embeds, boxes)
    straight = model(images(), boxes=BOXES, region_counts=COUNTS, texts=texts())
    handed = model(features=features, boxes=BOXES, region_counts=COUNTS, texts=texts())
    for output in (straight, handed):
        assert torch.equal(output.region_embeds, boxes)
        assert torch.equal(output.text_boxes, straight.text_boxes)
        assert torch.equal(output.text_prompt_embeds, straight.text_prompt_embeds)
    assert straight.hidden_states is None
    assert straight.text_prompt_embeds.shape == (2, 3, 32) and straight.text_boxes.shape == (2, 3, 4)
    assert straight.text_boxes.dtype == torch.float32
    assert ((straight.text_boxes > 0) & (straight.text_boxes < 56)).all()


@torch.no_grad()
def test_a_box_head_in_pixels_of_an_input_that_is_not_square(native):
    model = ClocVisionModel.from_native(native("mlcd"), projection_dim=24)
    model.box_head[2].weight.zero_()
    model.box_head[2].bias.copy_(torch.tensor([-50.0, 0, 50, 50]))
    wide = torch.randn(1, 3, 28, 84)
    torch.testing.assert_close(model(wide, texts=texts()[:1]).text_boxes[0, 0], torch.tensor([0.0, 14, 84, 28]))


@torch.no_grad()
def test_patches_stand_where_they_are_in_an_input_that_they_do_not_fill(native):
    """Boxes are written in shares of the input, and so are the centres of the patches."""
    model = ClocVisionModel.from_native(native("siglip", image_size=60), projection_dim=24)
    asked = []
    model.prompter.register_forward_pre_hook(lambda module, arguments: asked.append(arguments[1]))
    pixels = torch.randn(2, 3, 60, 60)
    first = model(pixels, boxes=BOXES, texts=texts())
    for centres in asked:
        torch.testing.assert_close(centres[[0, 5, 15]] * 60, torch.tensor([[7.0, 7], [21, 21], [49, 49]]))
    assert len(asked) == 2 and first.region_embeds.isfinite().all()
    model(torch.randn(2, 3, 56, 56), boxes=BOXES, interpolate_pos_encoding=True)
    assert torch.equal(asked[-1], grid_centres(4, 4))


def test_every_part_learns_from_its_own_output(native):
    model = ClocVisionModel.from_native(native("clip"), projection_dim=24).train()
    output = model(images(), boxes=BOXES, texts=texts())
    (model.projection(output.region_embeds).square().sum() + output.text_boxes.square().mean()).backward()
    without = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert without == {"tower.post_layernorm.weight", "tower.post_layernorm.bias"}


@torch.no_grad()
def test_boxes_by_roi_align_as_in_the_ablation(native, tmp_path):
    """Boxes are read as `RoiVisionModel` reads them, texts by the Prompter as before."""
    tower = native("mlcd")
    model = ClocVisionModel.from_native(tower, projection_dim=24, region_pool="roi_align")
    asked = {"boxes": BOXES, "region_counts": COUNTS, "texts": texts()}
    output, roi = model(images(), **asked), RoiVisionModel.from_native(tower)
    torch.testing.assert_close(output.region_embeds, roi(images(), BOXES, COUNTS).region_embeds)
    with_prompter = ClocVisionModel.from_native(tower, projection_dim=24)
    with_prompter.load_state_dict(model.state_dict())
    other = with_prompter(images(), **asked)
    assert torch.equal(other.text_boxes, output.text_boxes)
    assert (other.region_embeds - output.region_embeds).abs().max() > 0.01
    model.save_pretrained(tmp_path)
    assert torch.equal(load_tower(tmp_path)(images(), BOXES, COUNTS).region_embeds, output.region_embeds)


@torch.no_grad()
def test_save_and_open(model, tmp_path):
    expected = model(images(), boxes=BOXES, texts=texts())
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config, ClocVisionConfig) and config.projection_dim == 24
    for reopened in (load_tower(tmp_path), AutoModel.from_pretrained(tmp_path)):
        output = reopened(images(), boxes=BOXES, texts=texts())
        assert torch.equal(output.region_embeds, expected.region_embeds)
        assert torch.equal(output.text_boxes, expected.text_boxes)


def test_positions_are_added_where_the_tower_has_none_in_its_tokens(native):
    assert ClocVisionModel.from_native(native("mlcd")).prompter.add_token_pos
    assert not ClocVisionModel.from_native(native("clip")).prompter.add_token_pos
    assert ClocVisionModel.from_native(native("clip"), add_token_pos=True).prompter.add_token_pos


def test_what_the_registry_says(native):
    spec = describe_tower(ClocVisionModel.from_native(native("dinov3")).config)
    assert (spec.region_readout, spec.region_dim, spec.num_prefix_tokens) == ("cloc", 32, 1)


def test_new_parameters_are_the_same_after_the_same_seed(native):
    tower, first = native("clip"), None
    for _ in range(2):
        torch.manual_seed(5)
        state = ClocVisionModel.from_native(tower).state_dict()
        assert all(value.isfinite().all() for value in state.values())
        if first is not None:
            assert all(torch.equal(state[name], value) for name, value in first.items())
        first = {name: value.clone() for name, value in state.items()}


def test_half_precision(native):
    model = ClocVisionModel.from_native(native("clip").to(torch.bfloat16), projection_dim=24)
    output = model(images().bfloat16(), boxes=BOXES, texts=texts().bfloat16())
    assert output.region_embeds.dtype == torch.bfloat16 and output.region_embeds.isfinite().all()


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"prompter_pool": "max"}, "prompter_pool"),
        ({"prompter_heads": 3}, "prompter_heads"),
        ({"region_pool": "crop"}, "region_pool"),
    ],
)
def test_wrong_settings_are_one_sentence(native, fields, named):
    with pytest.raises(UserError, match=named):
        ClocVisionModel.from_native(native("clip"), **fields)
