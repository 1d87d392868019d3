"""Windows of a mixture: the order of samples, on any number of processes and from any place on, and bad samples."""

import multiprocessing
import pickle
import random
import time
from itertools import islice
from pathlib import Path

import pytest
import torch
from small_mixtures import COUNT, source, windows_of, write_sources

from regiontower.train_stages import picture_file
from regiontower.train_stages.chat_samples import Example, Unusable, encode, with_pixels
from regiontower.train_stages.chat_stream import SizedChatStream as Stream
from regiontower.train_stages.chat_stream import Windows, grouped, packed, plain
from regiontower.train_stages.json_lines import JsonLines
from regiontower.train_stages.mixture import Mixture, open_mixture
from regiontower.train_stages.mixture_recipe import MixtureSource
from regiontower.train_stages.mixture_sources import Lazy
from regiontower.vision_towers import UserError


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_sources(tmp_path_factory.mktemp("mixture"))


@pytest.fixture
def mixture(root):
    return open_mixture([source(root, "records.jsonl"), source(root, "talks.jsonl", format="conversations")], 5)


# ---- the order ----


def numbered(count, name="n"):
    return Lazy(range(count), lambda index, item: Example(f"{name}{item}", None, turns=(("Say it.", str(item)),)))


def test_without_weights_every_sample_comes_once_a_round():
    mixture = Mixture([numbered(5, "a"), numbered(7, "b")], None, seed=1)
    rounds = [[mixture[place].name for place in range(12 * n, 12 * n + 12)] for n in range(3)]
    assert all(len(set(names)) == 12 for names in rounds)
    assert rounds[0] != rounds[1] != rounds[2]
    assert rounds != [[Mixture([numbered(5, "a"), numbered(7, "b")], None, seed=2)[p].name for p in range(12)]]


def test_weights_are_kept_and_each_source_goes_round_by_itself():
    mixture = Mixture([numbered(50, "a"), numbered(7, "b")], [3.0, 1.0], seed=0)
    names = [mixture[place].name for place in range(8000)]
    share = sum(name.startswith("a") for name in names) / len(names)
    assert abs(share - 0.75) < 0.02
    small = [name for name in names if name.startswith("b")]
    for start in range(0, 700, 7):
        assert len(set(small[start : start + 7])) == 7
    again = Mixture([numbered(50, "a"), numbered(7, "b")], [3.0, 1.0], seed=0)
    assert again[7777].name == names[7777]  # without the places before it


def texts(rows):
    return [[tuple(sample.ids) for sample in row] for row in rows]


WAYS = {"grouped": (grouped, True), "packed": (packed(600), False), "plain": (plain, True)}


@pytest.mark.parametrize("way", WAYS)
def test_the_order_does_not_depend_on_how_many_processes_there_are(processor, mixture, way):
    arrange, by_count = WAYS[way]
    windows = windows_of(processor, mixture)
    alone = Stream(windows, arrange, by_count=by_count, batch=4)
    pair = Stream(windows, arrange, by_count=by_count, batch=2)
    rows = texts(islice(alone.examples(0, 1), 20))
    halves = [texts(islice(pair.examples(rank, 2), 10)) for rank in range(2)]
    assert rows == [halves[n % 2][n // 2] for n in range(20)]


@pytest.mark.parametrize("way", WAYS)
def test_a_stream_is_taken_up_at_the_sample(processor, root, way):
    arrange, by_count = WAYS[way]

    def stream():
        opened = open_mixture([source(root, "records.jsonl"), source(root, "talks.jsonl", format="conversations")], 5)
        return Stream(windows_of(processor, opened), arrange, by_count=by_count, batch=4)

    straight = texts(islice(stream().examples(1, 2), 14))
    for first in (1, 11):
        assert texts(islice(stream().examples_from(first, 1, 2), 14 - first)) == straight[first:]


def test_far_places_are_found_without_reading_what_lies_before(processor, mixture):
    windows = windows_of(processor, mixture)
    stream = Stream(windows, grouped, by_count=True, batch=4)
    next(stream.examples_from(16_000_003, 0, 1))
    assert windows.tally.seen <= 2 * windows.size + 1


def test_batches_are_made_before_a_picture_is_opened(processor, mixture, monkeypatch):
    opened = []
    read = picture_file.PictureFile.read
    monkeypatch.setattr(picture_file.PictureFile, "read", lambda self: opened.append(self.name) or read(self))
    stream = Stream(windows_of(processor, mixture), grouped, by_count=True, batch=4)
    rows = list(islice(stream.examples(0, 1), 16))
    batches = [rows[start : start + 4] for start in range(0, 16, 4)]
    shown = [{sample.picture is not None for (sample,) in batch} for batch in batches]
    assert {True} in shown and not opened
    items = stream.item(next(row for row in rows if row[0].picture is not None))
    assert len(opened) == 1 and items[0].pixels.shape == (3, 64, 64)


def test_other_processes_encode_the_same(processor, root):
    def stream(workers):
        opened = open_mixture([source(root, "records.jsonl"), source(root, "talks.jsonl", format="conversations")], 5)
        windows = Windows(opened, processor, 500, 16, 0, workers)
        return Stream(windows, packed(600), by_count=False, batch=4)

    here, there = stream(0), stream(2)
    rows = there.examples(0, 1)
    assert texts(islice(rows, 12)) == texts(islice(here.examples(0, 1), 12))
    assert there.windows.tally.seen >= 32
    copied = pickle.loads(pickle.dumps(stream(0)))  # as where processes are not forked
    assert texts(islice(copied.examples(0, 1), 4)) == texts(islice(here.examples(0, 1), 4))
    error = pickle.loads(pickle.dumps(Unusable("bad", "a", "it is broken")))
    assert (error.kind, str(error)) == ("bad", "a: it is broken")


def _hold(windows, pids):
    """A training process in the middle of a window."""
    with windows.encoders() as pool:
        list(windows.samples(0, pool))
        pids.write_text(" ".join(map(str, pool._processes)))
        time.sleep(100)


def test_processes_that_encode_end_with_a_training_process_that_is_killed(processor, root, tmp_path):
    if "fork" not in multiprocessing.get_all_start_methods():
        pytest.skip("needs fork")
    windows = Windows(open_mixture([source(root, "records.jsonl")], 5), processor, 500, 16, 0, 2)
    training = multiprocessing.get_context("fork").Process(target=_hold, args=(windows, tmp_path / "pids"))
    training.start()
    until = time.monotonic() + 100
    while not (tmp_path / "pids").exists() or not (tmp_path / "pids").read_text():
        assert time.monotonic() < until
        time.sleep(0.05)
    encoders = [Path("/proc", pid) for pid in (tmp_path / "pids").read_text().split()]
    if not encoders[0].exists():
        pytest.skip("needs /proc")
    training.kill()
    training.join()
    while any("\nState:\tZ" not in (each / "status").read_text() for each in encoders if each.exists()):
        assert time.monotonic() < until
        time.sleep(0.2)


# ---- samples ----


def test_a_sample_says_what_the_record_says(processor, mixture):
    example = next(example for example in mixture.everything() if example.record is not None)
    sample = encode(example, processor, 500, random.Random(0))
    again, other = (encode(example, processor, 500, random.Random(seed)) for seed in (0, 1))
    assert again.ids == sample.ids != other.ids and torch.equal(again.boxes, sample.boxes)
    assert sample.ids.count(processor.region_token_id) == len(sample.boxes) == len(sample.regions)
    assert with_pixels(sample, processor).pixels.tobytes() == processor.pixels(example.picture.open()).tobytes()


@pytest.mark.parametrize("text", ["What is <region>?", "It is <image>"])
def test_placeholders_in_a_text_are_bad_and_not_mistaken(processor, text):
    for turns in (((text, "a"),), (("a", text),)):
        with pytest.raises(Unusable, match="its text holds") as error:
            encode(Example("x", None, turns=turns), processor, 500, random.Random(0))
        assert error.value.kind == "bad"


def drawn_from(processor, examples, size=400):
    windows = windows_of(processor, Mixture([examples], None, 0), size, max_tokens=40)
    return windows, windows.filled(0, list(windows.samples(0)))


def test_more_than_one_percent_of_masked_samples_stops_the_run(processor):
    long = "a" * 200

    def read(every):
        return lambda index, item: Example(f"n{item}", None, turns=(("Say it.", long if item % every == 0 else "5"),))

    windows, samples = drawn_from(processor, Lazy(range(400), read(100)))
    assert len(windows.tally.masked) == 4 and len(samples) == 400 and None not in samples
    assert "4 masked" in windows.tally.summary() and "n0: one turn takes" in windows.tally.summary()
    with pytest.raises(UserError, match=r"no token is learned, more than max\(5, 1 %\): .*raise data.max_tokens"):
        drawn_from(processor, Lazy(range(400), read(40)))


def test_bad_samples_are_counted_and_too_many_stop_the_run(processor):
    def read(every):
        def example(index, item):
            if item % every == 0:
                raise Unusable("bad", f"n{item}", "it is broken")
            return Example(f"n{item}", None, turns=(("Say it.", "5"),))

        return example

    windows, samples = drawn_from(processor, Lazy(range(400), read(100)))
    assert len(windows.tally.bad) == 4 and len(samples) == 400
    with pytest.raises(UserError, match=r"more than max\(5, 1 %\).*it is broken"):
        drawn_from(processor, Lazy(range(400), read(40)))


def test_records_are_read_when_they_are_drawn(root, tmp_path, processor):
    """A bad line costs itself, not the file."""
    lines = (root / "records.jsonl").read_text().splitlines()
    path = root / "with_a_bad_one.jsonl"
    path.write_text("\n".join([*lines[:5], "{", *lines[5:]]))
    assert len(JsonLines(path)) == COUNT + 1
    windows = windows_of(processor, open_mixture([MixtureSource(str(path))], 0), COUNT + 1)
    assert len(windows.filled(0, list(windows.samples(0)))) == COUNT + 1
    (bad,) = windows.tally.bad
    assert "record 6" in bad.line and windows.tally.seen == COUNT + 1
