"""`bench train` runs on tiny models, and its samples are as long as it says."""

import json
import random
import statistics
from itertools import combinations

import pytest

from regiontower.benchmarks import _train_arms, run_benchmark
from regiontower.benchmarks._train_budget import grouped, grouped_padded, grouped_within, random_padded
from regiontower.benchmarks._train_samples import make_samples, text_lengths
from regiontower.train_stages.scenes import write_scenes


def run(capsys, monkeypatch, *options):
    """What stands on the last line of stdout, and what it comes from."""
    monkeypatch.setattr("sys.argv", ["before"])
    run_benchmark("train", [*options, "--small", "--rounds", "1", "--steps", "1", "--threads", "1", "--json"])
    said = capsys.readouterr()
    (last,) = said.out.splitlines()
    return json.loads(last), json.loads(said.err[said.err.rindex("\n{\n") :])


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer.save_pretrained(folder)
    return str(folder)


def test_packing_beside_the_peer(capsys, monkeypatch, tokenizer):
    pytest.importorskip("trl", reason="the peer is TRL (pip install 'regiontower[bench]')")
    found, details = run(capsys, monkeypatch, "--only", "packing", "--budget", "900", "--tokenizer", tokenizer)
    assert list(found) == ["packed_over_peer", "grouped_over_peer", "packing_bound"]
    about = details["packing"]
    assert details["command"].startswith("regiontower bench train --rounds 1") and details["machine"]
    assert about["padding"]["packed"] == 1.0 and about["padding"]["peer"] >= 1.0
    assert all(speed > 0 for speed in about["tokens_per_s"].values())
    speeds = about["peer_tokens_per_s_by_batch"]
    assert speeds.keys() == {"1", "2"} and speeds[str(about["peer_batch"])] == max(speeds.values())
    assert 0 < about["tower_share"] <= 1 and about["packed_over_accumulating_peer"] > 0
    assert about["batches_accumulated"] > 1
    rho, share = about["padding"]["peer"], about["tower_share"]
    assert found["packing_bound"] == pytest.approx(1 + (1 - share) * (rho - 1), abs=0.01)
    assert abs(found["packed_over_peer"] * about["tokens_per_s"]["peer"] / about["tokens_per_s"]["packed"] - 1) < 0.01


def test_the_cache_beside_the_tower(capsys, monkeypatch, tokenizer):
    headline, _ = run(capsys, monkeypatch, "--only", "cache", "--tokenizer", tokenizer)
    assert list(headline) == ["cached_over_uncached"]
    found = headline["cached_over_uncached"]
    assert found.keys() == {"vitb_nano", "vitb_135m", "vitb_135m_limit"}
    assert all(value > 0 for value in found.values()) and found["vitb_135m_limit"] > 1


def test_batches_keep_the_budget_of_padded_tokens():
    assert random_padded([7] * 9, 3) == 21
    expected = sum(2 * max(pair) for pair in combinations(range(1, 6), 2)) / 10
    assert random_padded(range(1, 6), 2) == pytest.approx(expected, rel=0.03)
    lengths = [64 + length for length in text_lengths(512, random.Random(1))]
    batch = grouped_within(lengths, 4096)
    assert grouped_padded(lengths, batch) <= 4096 < grouped_padded(lengths, batch + 1)
    members = [index for indices in grouped(lengths, batch) for index in indices]
    assert len(set(members)) == len(members) > 512 - batch
    assert grouped_within([5000, 5000], 4096) == 1


def test_a_step_of_several_batches_counts_them_all():
    watch = _train_arms.Watch(seconds=[2.0, 3.0])
    counted = _train_arms.Counted(list, 0, [(9, 9, 9)] * 2 + [(10, 14, 1)] * 4 + [(99, 99, 99)])
    assert counted.speed(watch, 2) == _train_arms.Speed(tokens=8.0, padding=1.4, step=2.5, pictures=2.0)


def test_a_step_is_timed_with_the_wait_for_its_batch(monkeypatch):
    clock = iter([10.0, 13.0, 14.0])
    monkeypatch.setattr(_train_arms.time, "perf_counter", lambda: next(clock))
    watch = _train_arms.Watch()
    for _ in range(3):
        watch.on_step_end(None, None, None)
    assert watch.seconds == [3.0, 1.0]


def test_texts_have_the_published_lengths(tiny_mllm, tmp_path):
    for count in (200, 1024):
        lengths = text_lengths(count, random.Random(0))
        assert lengths != sorted(lengths) and max(lengths) == 1500
        assert statistics.median(lengths) == pytest.approx(40, abs=1)
        assert sorted(lengths)[int(0.95 * count)] == pytest.approx(700, rel=0.06)
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
