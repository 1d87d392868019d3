"""`bench train` runs on tiny models, and its samples are as long as it says."""

import json
import random
import statistics

import pytest

from regiontower.benchmarks import run_benchmark
from regiontower.benchmarks._train_samples import make_samples, text_lengths
from regiontower.train_stages.scenes import write_scenes

KEYS = {"packed_over_peer", "grouped_over_peer", "packing_bound", "cached_over_uncached"}


def run(capsys, monkeypatch, *options):
    monkeypatch.setattr("sys.argv", ["before"])
    run_benchmark("train", [*options, "--small", "--rounds", "1", "--steps", "1", "--threads", "1", "--json"])
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer.save_pretrained(folder)
    return str(folder)


def test_packing_beside_the_peer(capsys, monkeypatch, tokenizer):
    pytest.importorskip("trl", reason="the peer is TRL (pip install 'regiontower[bench]')")
    found = run(capsys, monkeypatch, "--only", "packing", "--budget", "900", "--tokenizer", tokenizer)
    assert found.keys() >= KEYS - {"cached_over_uncached"}
    about = found["packing"]
    assert about["padding"]["packed"] == 1.0 and about["padding"]["peer"] >= 1.0
    assert all(speed > 0 for speed in about["tokens_per_s"].values())
    assert about["peer_tried"].keys() >= {"1", "2"} and str(about["peer_batch"]) in about["peer_tried"]
    rho, share = about["padding"]["peer"], about["tower_share"]
    assert found["packing_bound"] == pytest.approx(1 + (1 - share) * (rho - 1), abs=0.01)
    assert abs(found["packed_over_peer"] * about["tokens_per_s"]["peer"] / about["tokens_per_s"]["packed"] - 1) < 0.01


def test_the_cache_beside_the_tower(capsys, monkeypatch, tokenizer):
    found = run(capsys, monkeypatch, "--only", "cache", "--tokenizer", tokenizer)["cached_over_uncached"]
    assert found.keys() == {"vitb_nano", "vitb_135m", "vitb_135m_limit"}
    assert all(value > 0 for value in found.values()) and found["vitb_135m_limit"] > 1


def test_texts_have_the_published_lengths(tiny_mllm, tmp_path):
    lengths = sorted(text_lengths(20_000, random.Random(0)))
    assert 38 <= statistics.median(lengths) <= 42
    assert 650 <= lengths[int(0.95 * len(lengths))] <= 750
    _, processor = tiny_mllm
    scenes = write_scenes(tmp_path, 4, 0, progress=False)
    samples = make_samples(scenes, processor, 24, 0, longest=300)
    wanted = text_lengths(24, random.Random(0), 300)
    image = processor.image_tokens(processor.frame((64, 64)))
    texts = [len(sample.ids) - image for sample in samples]
    assert texts == wanted and max(texts) == 300
    for sample in samples:
        assert sample.ids.count(processor.region_token_id) == len(sample.boxes)
        assert sample.ids.count(processor.image_token_id) == image == 64
