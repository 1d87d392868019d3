"""Lifting towers in memory, taking them back, and other input sizes."""

import pytest
import torch

from regiontower.vision_towers import (
    RiceVisionModel,
    RoiVisionModel,
    UserError,
    describe_tower,
    lift_tower,
    load_tower,
    plain_tower,
    resize_tower,
)

PIXELS = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(0))
BOXES = torch.tensor([[[0.0, 0, 56, 56]], [[14, 14, 42, 42]]])


@pytest.mark.parametrize("name", ["clip", "siglip", "mlcd", "dinov2", "dinov3", "aimv2"])
def test_a_lifted_tower_is_what_load_tower_opens(native, name, tmp_path):
    tower = native(name)
    tower.save_pretrained(tmp_path)
    opened, lifted = load_tower(tmp_path), lift_tower(tower)
    assert type(lifted) is type(opened) and lift_tower(lifted) is lifted
    with torch.no_grad():
        ours, theirs = (t(PIXELS, boxes=BOXES, output_hidden_states=True) for t in (lifted, opened))
    assert torch.equal(ours.region_embeds, theirs.region_embeds)
    assert torch.equal(ours.last_hidden_state, theirs.last_hidden_state)
    assert lifted.config._attn_implementation == "sdpa" and not lifted.training
    assert not any(tensor.is_meta for tensor in (*lifted.parameters(), *lifted.buffers()))


def test_lifting_copies_no_weights(native):
    tower = native("mlcd")
    lifted = lift_tower(tower)
    assert isinstance(lifted, RiceVisionModel)
    assert lifted.class_pos_emb.data_ptr() == tower.class_pos_emb.data_ptr()


def test_a_plain_tower_is_native_where_that_loses_nothing(native):
    for name in ("clip", "mlcd", "siglip"):
        tower = native(name)
        assert type(plain_tower(lift_tower(tower))) is type(tower) and type(plain_tower(tower)) is type(tower)
    assert isinstance(plain_tower(native("dinov3")), RoiVisionModel)


@pytest.mark.parametrize("name", ["clip", "siglip", "mlcd", "dinov2", "aimv2", "aimv2_native"])
def test_a_resized_tower_is_the_native_one_interpolating(native, name):
    tower = native(name)
    larger = torch.randn(1, 3, 84, 84)
    rotary = describe_tower(tower.config).any_resolution
    with torch.no_grad():
        free = {} if rotary or name == "aimv2" else {"interpolate_pos_encoding": True}
        expected = None if name == "aimv2" else tower(larger, **free).last_hidden_state
        resized = resize_tower(tower, 84)
        found = resized(larger).last_hidden_state
    assert describe_tower(resized.config).image_size == 84 and found.shape[1] >= 36
    if expected is not None:
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_a_lifted_tower_is_resized_inside(native):
    resized = resize_tower(lift_tower(native("clip")), 84)
    assert (
        resized.config.image_size == resized.config.tower_config.image_size == describe_tower(resized.config).image_size
    )
    with torch.no_grad():
        assert resized(torch.zeros(1, 3, 84, 84), boxes=BOXES[:1]).region_embeds.shape == (1, 1, 32)
    assert isinstance(resize_tower(lift_tower(native("mlcd")), 84), RiceVisionModel)


def test_a_size_that_cuts_patches_is_refused(native):
    with pytest.raises(UserError, match="the nearest size is 98") as error:
        resize_tower(native("clip"), 100)
    assert "\n" not in str(error.value)
