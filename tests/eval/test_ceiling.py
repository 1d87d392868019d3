"""Supervised heads: targets of the location head, and that the heads find what is plainly there."""

import pytest
import torch

from regiontower.eval import ceiling
from regiontower.eval.ceiling import CeilingConfig, supervised_ceiling
from regiontower.vision_towers import RiceVisionConfig, RiceVisionModel


def test_a_token_learns_the_smallest_object_over_its_middle():
    """4 x 4 patches of 14 px; middles at 7, 21, 35, 49."""
    scene = ceiling._Scene(
        torch.tensor([[0.0, 0, 56, 28], [15, 15, 30, 30], [36, 36, 40, 40]]),  # wide, small on it, between the middles
        torch.tensor([5, 6, 7]),
    )
    classes, boxes = ceiling._targets(scene, (4, 4), 14, background=9)
    assert classes.view(4, 4).tolist() == [[5, 5, 5, 5], [5, 6, 5, 5], [9, 9, 7, 9], [9, 9, 9, 9]]
    assert boxes.view(4, 4, 4)[1, 1].tolist() == [15, 15, 30, 30]
    assert boxes.view(4, 4, 4)[2, 2].tolist() == [36, 36, 40, 40]


def test_distances_are_boxes_around_the_middles():
    distances = torch.zeros(1, 2, 2, 4)
    distances[0, 1, 0] = torch.tensor([0.5, 1.0, 1.5, 0.25])
    boxes = ceiling._boxes(distances, patch=10)[0]
    assert boxes[0].tolist() == [5, 5, 5, 5]
    assert boxes[2].tolist() == [0, 5, 20, 17.5]  # middle (5, 15)


@pytest.fixture(scope="module")
def found(squares):
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 2}
    tower = RiceVisionModel(RiceVisionConfig(**sizes, patch_size=8, image_size=56, initializer_range=0.1))
    config = CeilingConfig(readouts=("own", "value"), width=32, epochs=60, batch_size=32)
    return supervised_ceiling(tower, squares(160, 0), squares(20, 1), config)


def test_heads_find_plain_colours_and_where_they_are(found):
    """Colours survive in a tower that has learned nothing; chance is a third, and a box at random overlaps by less."""
    assert found["region_top1"] > 0.8 and found["region_n"] == 20
    assert found["text_top1"] > 0.8 and found["text_n"] == 20
    assert found["value_region_top1"] > 0.8 and found["value_region_n"] == 20
    assert found["located_acc50"] > 0.6 and found["located_n"] == 40
