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
    natives, ours = regions.towers(sizes)
    assert ours.keys() == regions.NATIVES.keys()
    for name, tower in ours.items():
        native = natives[regions.NATIVES[name]]
        torch.testing.assert_close(tower(pixels).pooler_output, native(pixels).pooler_output)


def test_ratios_are_those_of_the_same_round(monkeypatch):
    """Every pass over the image takes 2 s, with boxes 3 s (8 s in the first round), and a batch of four crops 10 s."""
    calls = []

    def tower(name):
        def run(pixels, boxes=None):
            calls.append((name, len(pixels), boxes is not None))

        return run

    def timed(call):
        before = len(calls)
        call()
        (_, crops, with_boxes), first = calls[before], len(calls) < 60
        return 10.0 * (len(calls) - before) if crops > 1 else (8.0 if first else 3.0) if with_boxes else 2.0

    monkeypatch.setattr(regions, "timed", timed)
    natives, ours = ({name: tower(name) for name in names} for names in (("mlcd", "clip"), regions.NATIVES))
    found = regions.ratios(natives, ours, 12, {"mlcd": 4, "clip": 6}, rounds=9)
    assert found["rice"] == {"crops_over_ours": 10.0, "ours_over_forward": 1.5}  # three batches of four
    assert found["cloc"] == found["umg_clip"] == {"crops_over_ours": 6.67, "ours_over_forward": 1.5}
    assert [name for name, crops, _ in calls if crops > 1][:5] == ["mlcd"] * 3 + ["clip"] * 2
