"""Resolutions that change within a run."""

from dataclasses import replace

import pytest
import torch

from regiontower.train_stages.view_schedule import check_size, shrink, view_schedule
from regiontower.vision_towers import RiceVisionConfig, describe_tower
from regiontower.vision_towers.errors import UserError

SPEC = describe_tower(RiceVisionConfig(hidden_size=32, num_attention_heads=1, patch_size=8, image_size=32))


def batch():
    pixels = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    pixels[:, :, :16, 16:] = 200  # the upper right quarter
    masks = torch.zeros(2, 1, 4, 4)
    masks[:, :, :2, 2:] = 1.0
    masks[1, 0, 0, 0] = 0.5
    return {"pixel_values": pixels, "boxes": torch.tensor([[[16.0, 0.0, 32.0, 16.0]]] * 2), "masks": masks, "n": 1}


def test_everything_in_a_batch_shrinks_together():
    small = shrink(batch(), 16, 8)
    assert small["pixel_values"].shape == (2, 3, 16, 16) and small["pixel_values"].dtype == torch.uint8
    assert (small["pixel_values"][:, :, :6, 10:] == 200).all() and (small["pixel_values"][:, :, 10:] == 0).all()
    assert small["boxes"].tolist() == [[[8.0, 0.0, 16.0, 8.0]]] * 2
    assert small["masks"][0, 0].tolist() == [[0.0, 1.0], [0.0, 0.0]]
    assert small["masks"][1, 0, 0, 0] == 0.125 and small["n"] == 1


def test_the_size_follows_the_share_of_the_run():
    change = view_schedule(((0.3, 8), (0.6, 16)), 32, SPEC)
    sides = [change(batch(), share)["pixel_values"].shape[-1] for share in (0.0, 0.29, 0.3, 0.59, 0.6, 1.0)]
    assert sides == [8, 8, 16, 16, 32, 32]


@pytest.mark.parametrize("steps", [((0.6, 8), (0.3, 16)), ((1.0, 8),), ((0.5, 12),), ((0.5, 40),)])
def test_schedules_that_cannot_be_are_refused(steps):
    with pytest.raises(UserError, match=r"data\.view_schedule"):
        view_schedule(steps, 32, SPEC)


def test_a_size_is_the_tower_s_own_or_a_multiple_of_its_patch():
    own = replace(SPEC, image_size=36)  # no multiple of 8
    for spec in (own, replace(own, any_resolution=False)):
        check_size("data.view", 36, spec)
    check_size("data.view", 40, own)
    with pytest.raises(UserError, match=r"data\.view is 37, it must be a multiple of the tower's patch size 8"):
        check_size("data.view", 37, own)
    with pytest.raises(UserError, match=r"data\.side is 40, but this tower takes 36 px images only"):
        check_size("data.side", 40, replace(own, any_resolution=False))


def test_a_tower_of_one_size_is_refused():
    with pytest.raises(UserError, match="one input size"):
        view_schedule(((0.5, 16),), 32, replace(SPEC, any_resolution=False))
