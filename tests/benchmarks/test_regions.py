"""The script runs, and its towers hold the weights of the native ones."""

import json

import torch

from regiontower.benchmarks import regions, run_benchmark


def test_every_tower_is_measured(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["before"])
    run_benchmark("regions", ["--small", "--rounds", "1", "--boxes", "2", "--threads", "1", "--json"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    for name in ("rice", "cloc", "umg_clip"):
        assert found[name]["2"]["crops_over_ours"] > 0 and found[name]["2"]["ours_over_forward"] > 0


@torch.inference_mode()
def test_the_region_towers_are_the_native_ones():
    sizes = regions.SIZES | {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 2}
    pixels = torch.randn(1, 3, regions.SIDE, regions.SIDE)
    for native, ours in regions.towers(sizes).values():
        torch.testing.assert_close(ours(pixels).pooler_output, native(pixels).pooler_output)
