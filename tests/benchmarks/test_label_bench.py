"""The measures of `bench label`, on tiny models, and `bench label-run` on a handful of pictures."""

import argparse

import pytest
from PIL import Image

from regiontower.benchmarks import label as bench
from regiontower.benchmarks.label_run import label_run
from regiontower.train_stages.record_io import read_records
from regiontower.train_stages.webdataset import IMAGE_SUFFIXES
from regiontower.vision_towers import load_tower


@pytest.fixture
def pictures(tmp_path, noise_image):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(5):
        noise_image(8, 6, number).resize((160, 120), Image.Resampling.NEAREST).save(folder / f"{number}.png")
    (folder / "notes.txt").write_text("no picture")
    return folder


def test_every_engine_runs_as_it_is_measured(pictures, tmp_path):
    """rice-ocr and rice-objects leave no picture unseen; vesl and granular open their models and write or pass over."""
    for module in ("faiss", "textblob", "rapidocr", "onnxruntime"):
        pytest.importorskip(module)
    images = bench.take(pictures, tmp_path / "images", 2)
    assert [path.name for path in images] == ["00000.png", "00001.png"]
    sizes = bench.Sizes(width=32, layers=1, heads=2, detector=64, new_tokens=2)
    runs = bench.engine_runs(tmp_path / "models", bench.ENGINES, sizes)
    assert list(runs) == list(bench.ENGINES)
    options = bench.RunConfig(per_shard=2, device="cpu", progress=False)
    for name, run in runs.items():
        result = run(bench.ImageSource(tmp_path / "images"), tmp_path / name, options)
        assert result.labelled_now == 2 and result.bad == []


def test_what_is_measured(pictures, tmp_path, monkeypatch):
    """With seconds that are known: two for the start, a tenth for an image, half of that with two processes."""
    asked = []

    def timed(run, images, work, options):
        count = sum(path.suffix[1:] in IMAGE_SUFFIXES for path in images.iterdir())
        asked.append((run, count, options))
        return 2 + 0.1 * max(0, count - bench.FEW) / options["processes"]

    monkeypatch.setattr(bench, "timed", timed)
    monkeypatch.setattr(bench, "find_spec", lambda name: None)
    images = bench.take(pictures, tmp_path / "images", 5)
    found = bench.measure({"one": "run"}, images, tmp_path / "work", repeats=2)["one"]
    assert found["1"] == {"images_per_second": round(5 / 2.3, 3), "start_seconds": 2, "seconds": [2.3, 2.3]}
    assert found["two_processes_beside_one"] == pytest.approx(2.3 / 2.15, abs=2e-3)
    assert [row["images"] for row in found["growth"]] == [3, 3, 5]
    assert [row["seconds_an_image"] for row in found["growth"]] == [0.1, 0.1, 0.1]
    ways = [(count, options["processes"]) for _, count, options in asked]
    assert ways[:8] == [(2, 1), (5, 1), (2, 2), (5, 2)] * 2  # in turn


def test_labels_train_a_tower_that_is_probed(shared_data, tmp_path):
    """Two pictures of each kind and two steps, through all three stages."""
    for module in ("faiss", "rapidocr", "onnxruntime"):
        pytest.importorskip(module)
    small = "{hidden_size: 24, layers: 2, heads: 2, intermediate_size: 48, patch_size: 14, image_size: 56}"
    arguments = argparse.Namespace(
        data=shared_data,
        out=tmp_path,
        tower="nano",
        tokenizer="nano-lm",
        clusters=4,
        limit=2,
        steps=2,
        processes=1,
        sets=[f"model.size={small}", "train.batch_size=4"],
    )
    found = label_run(arguments)
    assert found["labels"]["rice-ocr"]["images"] == found["labels"]["rice-objects"]["images"] == 2
    (shard,) = (tmp_path / "objects").glob("*.jsonl")
    regions = [region for record in read_records(shard, check_images=True).records for region in record.regions]
    assert regions and all(region.cluster in range(4) and region.category is None for region in regions)
    assert load_tower(tmp_path / "tower").config.hidden_size == 24
    for name in ("tower", "untrained"):
        assert 0 <= found["probe"][name]["linear"]["value"] <= 1
    before, after = (load_tower(tmp_path / name).state_dict() for name in ("untrained", "tower"))
    assert any((before[name] != after[name]).any() for name in before)
    for name in ("text.png", "objects.png"):
        with Image.open(tmp_path / name) as page:
            assert page.width > 400
