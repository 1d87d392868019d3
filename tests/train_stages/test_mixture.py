"""Mixtures: what sources hold, the order of samples, and runs that are taken up again."""

import io
import json
import multiprocessing
import os
import pickle
import random
import signal
import time
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import TrainerCallback

from regiontower.train_stages import picture_file
from regiontower.train_stages.chat_samples import Example, Unusable, encode, with_pixels
from regiontower.train_stages.chat_stream import SizedChatStream as Stream
from regiontower.train_stages.chat_stream import Windows, grouped, packed, plain
from regiontower.train_stages.engine import StageInterrupted
from regiontower.train_stages.json_lines import JsonLines
from regiontower.train_stages.mixture import Mixture, mixture_hash, open_mixture
from regiontower.train_stages.mixture_recipe import MixtureData, MixtureSource
from regiontower.train_stages.mixture_sources import Lazy
from regiontower.train_stages.mllm_stage import AlignRecipe, align
from regiontower.train_stages.recipe import load_recipe
from regiontower.train_stages.record_io import read_records
from regiontower.train_stages.scenes import write_scenes
from regiontower.train_stages.webdataset import write_shards
from regiontower.vision_towers import UserError

COUNT = 12
TALK = [
    {"from": "human", "value": "<image>\nWhat is it?"},
    {"from": "gpt", "value": "A star."},
    {"from": "human", "value": "Which colour?"},
    {"from": "gpt", "value": "red"},
]
ALONE = [{"from": "human", "value": "Say five."}, {"from": "gpt", "value": "5"}]
SYSTEM = [{"from": "system", "value": "Be brief."}, *ALONE]
MESSAGES = [
    {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "What is it?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "A star."}]},
]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """The same pictures as records, shards, LLaVA conversations and data sets."""
    folder = tmp_path_factory.mktemp("mixture")
    path = write_scenes(folder, COUNT, 0, preset="easy", progress=False)
    records = read_records(path)
    names = [record.image for record in records.records]
    talks = [{"id": str(n), "image": name, "conversations": TALK} for n, name in enumerate(names)]
    talks += [{"id": "text", "conversations": ALONE}] * 4
    (folder / "talks.json").write_text(json.dumps(talks))
    (folder / "talks.jsonl").write_text("\n\n".join(json.dumps(talk) for talk in talks) + "\n")
    return folder


def source(root, file, **fields):
    return MixtureSource(str(root / file), **fields)


def picture_of(root):
    record = read_records(root / "records.jsonl").records[0]
    return Image.open(root / record.image).convert("RGB")


# ---- what sources hold ----


def test_records_and_their_shards_give_the_same_samples(root):
    pytest.importorskip("webdataset")
    shards = write_shards(read_records(root / "records.jsonl"), root / "shards", per_shard=5)
    both = [
        open_mixture([source(root, "records.jsonl")], 0),
        open_mixture([MixtureSource(tuple(map(str, shards)), format="webdataset")], 0),
    ]
    assert both[0].size == both[1].size == COUNT
    for place in range(2 * COUNT):
        first, second = (mixture[place] for mixture in both)
        assert first.record.regions == second.record.regions
        assert first.picture.open().tobytes() == second.picture.open().tobytes()


@pytest.mark.parametrize("file", ["talks.json", "talks.jsonl"])
def test_llava_conversations_are_kept_turn_by_turn(root, file):
    mixture = open_mixture([source(root, file, format="conversations")], 0)
    examples = list(mixture.everything())
    assert len(examples) == mixture.size == COUNT + 4
    assert examples[0].turns == (("What is it?", "A star."), ("Which colour?", "red"))
    assert examples[0].picture.open().tobytes() == picture_of(root).tobytes()
    assert examples[-1].picture is None and examples[-1].turns == (("Say five.", "5"),)


def test_conversations_in_shards(root, tmp_path):
    webdataset = pytest.importorskip("webdataset")
    with webdataset.TarWriter(str(tmp_path / "0.tar"), encoder=False) as tar:
        png = io.BytesIO()
        picture_of(root).save(png, "png")
        talk = json.dumps({"conversations": TALK}).encode()
        tar.write({"__key__": "a", "png": png.getvalue(), "json": talk})
        tar.write({"__key__": "b", "json": json.dumps({"conversations": SYSTEM}).encode()})
        tar.write({"__key__": "c", "png": png.getvalue(), "json": b"[]"})
    mixture = open_mixture([source(tmp_path, "0.tar", format="webdataset")], 0)
    shown, alone = mixture.everything()
    assert mixture.size == 3 and shown.picture.open().tobytes() == picture_of(root).tobytes()
    assert shown.turns[1] == ("Which colour?", "red") and alone.system == "Be brief."


@pytest.mark.parametrize("kind", ["parquet", "streamed", "folder", "streamed folder"])
def test_data_sets_of_hugging_face(root, tmp_path, kind):
    datasets = pytest.importorskip("datasets")
    picture = picture_of(root)
    rows = {"image": [picture, None], "conversations": [TALK, ALONE]}
    folder, streamed = "folder" in kind, "streamed" in kind
    options = {"stream": True, "weight": 1.0} if streamed else {}
    if folder:
        rows = {
            "images": [[picture], []],
            "messages": [MESSAGES, [{"role": m["role"], "content": [m["content"][-1]]} for m in MESSAGES]],
        }
    features = None
    if folder:
        part = {"type": datasets.Value("string"), "text": datasets.Value("string")}
        message = {"role": datasets.Value("string"), "content": datasets.List(part)}
        features = datasets.Features({"images": datasets.List(datasets.Image()), "messages": datasets.List(message)})
    else:
        turn = {"from": datasets.Value("string"), "value": datasets.Value("string")}
        features = datasets.Features({"image": datasets.Image(), "conversations": datasets.List(turn)})
    made = datasets.Dataset.from_dict(rows, features=features)
    if folder:
        made.save_to_disk(str(tmp_path / "set"))
        mixture = open_mixture([source(tmp_path, "set", format="datasets", **options)], 0)
    else:
        made.to_parquet(str(tmp_path / "set.parquet"))
        mixture = open_mixture([source(tmp_path, "set.parquet", format="datasets", **options)], 0)
    found = sorted((mixture[place] for place in range(2)), key=lambda example: example.picture is None)
    assert found[0].turns[0] == ("What is it?", "A star.")
    assert found[0].picture.open().tobytes() == picture.tobytes()
    assert found[1].picture is None
    assert mixture.endless == streamed


def test_streamed_records_and_their_place(root):
    pytest.importorskip("datasets")
    options = {"stream": True, "weight": 1.0, "buffer": 4}
    one, two = (open_mixture([source(root, "records.jsonl", **options)], 3) for _ in range(2))
    names = [one[place].name for place in range(2 * COUNT)]
    assert sorted(names[:COUNT]) == sorted(names[COUNT:]) and len(set(names)) == COUNT
    assert two[2 * COUNT - 1].name == names[-1]  # taken up there
    assert two[3].name == names[3]  # and back
    with pytest.raises(ValueError, match="give it, and all others, a weight"):
        source(root, "records.jsonl", stream=True)


def test_what_cannot_be_read_is_one_sentence(root, tmp_path):
    for fields, said in (
        ({"records": str(tmp_path / "absent.jsonl")}, "cannot be read"),
        ({"records": str(tmp_path / "absent.json"), "format": "conversations"}, "cannot be read"),
        ({"records": str(tmp_path / "absent.tar"), "format": "webdataset"}, "cannot be read"),
        ({"records": str(tmp_path / "absent.tar.gz"), "format": "webdataset"}, "set stream: true"),
        ({"records": str(root / "records.jsonl"), "format": "record"}, "did you mean 'records'"),
        ({"records": str(root / "records.jsonl"), "mix": {"grnding": 1}}, "unknown kinds"),
    ):
        with pytest.raises(UserError, match=said) as error:
            open_mixture([MixtureSource(**fields)], 0)
        assert "\n" not in str(error.value)


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


def windows_of(processor, mixture, size=16, seed=0, max_tokens=500):
    return Windows(mixture, processor, max_tokens, size, seed)


def texts(rows):
    return [[tuple(sample.ids) for sample in row] for row in rows]


@pytest.fixture
def processor(tiny_mllm):
    return tiny_mllm[1]


@pytest.fixture
def mixture(root):
    return open_mixture([source(root, "records.jsonl"), source(root, "talks.jsonl", format="conversations")], 5)


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


# ---- recipes and runs ----


def recipe(root, tiny_parents, **data):
    talks = {"records": str(root / "talks.jsonl"), "format": "conversations"}
    records = {"records": str(root / "records.jsonl"), "mix": {"classify": 1, "grounding": 1}, "turns": 3}
    return load_recipe(
        {
            "model": {"tower": str(tiny_parents / "tower"), "language_model": str(tiny_parents / "lm")},
            "data": {"sources": [records, talks], "window": 8, **data},
            "train": {"steps": 5, "batch_size": 2, "threads": 1, "log_steps": 1, "save_steps": 2},
        },
        AlignRecipe,
    )


def weighted(root):
    """Every kind of source, one of them streamed."""
    pytest.importorskip("datasets")
    pytest.importorskip("webdataset")
    if not (root / "kinds").exists():
        shards = write_shards(read_records(root / "records.jsonl"), root / "kinds", per_shard=50)
        (root / "kinds" / "rows.jsonl").write_text(json.dumps({"conversations": ALONE}) + "\n")
        assert len(shards) == 1
    (shard,) = (root / "kinds").glob("*.tar")
    return [
        {"records": str(root / "records.jsonl"), "mix": {"classify": 1}, "stream": True, "buffer": 4, "weight": 2},
        {"records": str(root / "talks.json"), "format": "conversations", "weight": 1},
        {"records": str(shard), "format": "webdataset", "mix": {"classify": 1}, "weight": 1},
        {"records": str(root / "kinds" / "rows.jsonl"), "format": "datasets", "weight": 0.5},
    ]


@pytest.mark.parametrize("batches", ["grouped", "packed", "weighted"])
def test_a_run_that_was_stopped_equals_the_straight_one(root, tiny_parents, tmp_path, batches):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                os.kill(os.getpid(), signal.SIGTERM)

    data = (
        {"sources": weighted(root), "window": 6} if batches == "weighted" else {"batches": batches, "row_tokens": 400}
    )
    asked = recipe(root, tiny_parents, max_tokens=400, **data)
    align(asked, tmp_path / "straight", device="cpu")
    with pytest.raises(StageInterrupted):
        align(asked, tmp_path / "stopped", device="cpu", callbacks=[Stop()])
    align(asked, tmp_path / "stopped", device="cpu")
    straight, stopped = (load_file(tmp_path / name / "model.safetensors") for name in ("straight", "stopped"))
    assert all(torch.equal(straight[name], stopped[name]) for name in straight)
    stage = json.loads((tmp_path / "straight" / "stage.json").read_text())
    assert stage["data"] == {"sources": mixture_hash(asked.data.sources)}


def test_an_epoch_is_every_sample_once(root, tiny_parents, processor):
    asked = recipe(root, tiny_parents, batches="plain")
    stream = Stream(windows_of(processor, open_mixture(asked.data.sources, 0)), plain, by_count=True, batch=2)
    assert len(stream) == 2 * COUNT + 4
    in_rows = Stream(windows_of(processor, open_mixture(asked.data.sources, 0)), packed(600), by_count=False, batch=2)
    assert 3 < len(in_rows) < len(stream)
    names = Counter(open_mixture(asked.data.sources, 0)[place].name for place in range(len(stream)))
    assert max(names.values()) <= 4  # the conversations without a picture have one name


def test_recipes_that_cannot_be_are_one_sentence(root, tiny_parents):
    for data, said in (
        ({"batches": "sorted"}, "data.batches"),
        ({"batch": "packed"}, "did you mean data.batches"),
        ({"sources": []}, "data.sources"),
        ({"sources": [{"records": "a", "weight": 1}, {"records": "b"}]}, "give a weight to every source or to none"),
        ({"turns": 4}, "data.turns"),
    ):
        with pytest.raises(UserError, match=said) as error:
            recipe(root, tiny_parents, **data)
        assert "<" not in str(error.value)
    assert isinstance(recipe(root, tiny_parents).data, MixtureData)
