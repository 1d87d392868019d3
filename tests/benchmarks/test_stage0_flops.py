"""The count of a step, on few scenes."""

import pytest

from regiontower.benchmarks import stage0_flops
from regiontower.train_stages.scenes import write_scenes


@pytest.mark.slow
def test_an_image_costs_what_its_tokens_and_weights_say(tmp_path):
    records = stage0_flops._with_clusters(write_scenes(tmp_path / "scenes", 8, 0, preset="easy", progress=False))
    few, many = (stage0_flops._step("rice-nano-zoom", records, tmp_path / str(size), size) for size in (2, 4))
    assert few["steps"] == many["steps"] == 1200
    # Forward and backward take 6 operations a weight and token: 17 tokens an image of 56 px, and some for its regions.
    # What does not grow with the batch is the optimizer's work on matrices.
    expected = 2 * 6 * 2.78e6 * 17 / 1e9
    assert 0.8 * expected < many["gflop_a_step"] - few["gflop_a_step"] < 1.6 * expected
