"""The facts a swap reports about a model."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from regiontower.benchmarks._tiny_llavas import TOWERS, tiny_tower
from regiontower.mllm.swap_report import tower_flops


@pytest.mark.parametrize("name", TOWERS)
def test_two_depths_tell_the_operations_of_any(name):
    tower = tiny_tower(name, num_hidden_layers=5).eval().to("meta")  # the counter does not know a CPU's attention
    side = tower.config.image_size
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        tower(torch.zeros(1, 3, side, side, device="meta"))
    assert (
        tower_flops(tower.config) == pytest.approx(counter.get_total_flops(), rel=1e-6)
        and tower.config.num_hidden_layers == 5
    )
