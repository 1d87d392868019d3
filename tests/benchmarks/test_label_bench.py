"""The measures of `bench label`, on tiny models, and `bench label-run` on a handful of pictures."""

import argparse
import os
import time
from types import SimpleNamespace

import pytest
from PIL import Image

from regiontower.benchmarks import label as bench
from regiontower.benchmarks.label_run import label_run, raw_pictures
from regiontower.train_stages.label.noun_phrases import noun_phrases
from regiontower.train_stages.label.taggers import open_tagger
from regiontower.train_stages.record_io import read_records
from regiontower.train_stages.webdataset import IMAGE_SUFFIXES
from regiontower.vision_towers import load_tower


def test_every_engine_runs_as_it_is_measured(tmp_path):
    """No picture is left unseen; and captions have phrases, or the detector of vesl would have nothing to do."""
    for module in ("faiss", "textblob", "rapidocr", "onnxruntime"):
        pytest.importorskip(module)
    bench.write_scenes(tmp_path / "scenes", 5, seed=0)
    images = bench.take(tmp_path / "scenes" / "images", tmp_path / "images", 5)
    assert [path.stem for path in images] == [f"0000{number}" for number in range(4)]  # they fill shards
    sizes = bench.Sizes(width=32, layers=1, heads=2, detector=64, new_tokens=12)
    runs = bench.engine_runs(tmp_path / "models", bench.ENGINES, sizes)
    assert list(runs) == list(bench.ENGINES)
    options = bench.RunConfig(per_shard=2, device="cpu", progress=False)
    for name, run in runs.items():
        result = run(bench.ImageSource(tmp_path / "images"), tmp_path / name, options)
        assert result.labelled_now == 4 and result.bad == []
    records = [record for path in (tmp_path / "vesl").glob("*.jsonl") for record in read_records(path).records]
    assert any(noun_phrases(record.captions, open_tagger("textblob")) for record in records)


def test_what_is_measured(tmp_path, noise_image, monkeypatch):
    """With seconds that are known: three for the start, a tenth for an image, one at the end."""
    asked = []

    def timed(run, images, work, options):
        count, processes = sum(path.suffix[1:] in IMAGE_SUFFIXES for path in images.iterdir()), options["processes"]
        asked.append((run, count, options))
        ends = [3 + 0.1 * bench.PER_SHARD * (1 + number // processes) for number in range(count // bench.PER_SHARD)]
        return bench.Timing(ends[-1] + 1, tuple(ends), 2.5)

    monkeypatch.setattr(bench, "timed", timed)
    monkeypatch.setattr(bench, "find_spec", lambda name: None)
    (tmp_path / "pictures").mkdir()
    for number in range(17):
        noise_image(8, 6, number).save(tmp_path / "pictures" / f"{number:02d}.png")
    images = bench.take(tmp_path / "pictures", tmp_path / "images", 17)
    found = bench.measure({"one": "run"}, images, tmp_path / "work", repeats=2)["one"]
    assert found["1"] == {
        "images_per_second": round(16 / 5.6, 3),
        "labelling_per_second": pytest.approx(10),
        "start_seconds": pytest.approx(3),
        "seconds": [pytest.approx(5.6)] * 2,
    }
    assert (found["2"]["labelling_per_second"], found["2"]["start_seconds"]) == (pytest.approx(20), pytest.approx(3))
    assert (found["two_processes_beside_one"], found["regions_an_image"]) == (pytest.approx(2), 2.5)
    assert [row["images"] for row in found["growth"]] == [4, 8, 16]
    assert [row["seconds_an_image"] for row in found["growth"]] == [0.35, 0.225, 0.1625]
    ways = [(count, options["processes"]) for _, count, options in asked]
    assert ways == [(16, 1), (16, 2)] * 2 + [(8, 1), (4, 1)]  # in turn, then the growth


def test_when_shards_are_finished_is_read_from_their_notes(tmp_path):
    """From nothing: what an earlier run left would be counted, too."""
    (tmp_path / "work" / "out" / "done").mkdir(parents=True)
    (tmp_path / "work" / "out" / "done" / "00009.json").touch()

    def run(source, out, config):
        assert (config.processes, config.per_shard) == (2, bench.PER_SHARD) and not out.exists()
        (out / "regions" / "done").mkdir(parents=True)  # as rice-objects has it
        for number, after in enumerate((9, 5, 7)):
            note = out / "regions" / "done" / f"{number:05d}.json"
            note.touch()
            os.utime(note, (time.time() + after,) * 2)
        return SimpleNamespace(regions=30, images=12)

    found = bench.timed(run, tmp_path / "images", tmp_path / "work", {"processes": 2})
    assert [round(end) for end in found.ends] == [5, 7, 9] and found.regions == 2.5 and found.seconds < 4
    assert found.pace(2) == pytest.approx(1, rel=0.05) and found.start(2) == pytest.approx(3, abs=0.3)


def test_pictures_are_those_that_were_asked_for(shared_data, tmp_path):
    """Also after a run that asked for more."""
    for limit in (3, 2):
        folder = raw_pictures(shared_data, "ocr", tmp_path / "pictures", limit)
        assert len([path for path in folder.iterdir() if path.is_file()]) == limit


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
        set=[f"model.size={small}", "train.batch_size=4"],
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
    assert label_run(arguments) == found  # finished stages are taken up
