"""Stage 0 on streamed records and shards: the same items, in an order of their own, for every process its part."""

import json
import os
import signal
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import TrainerCallback

from regiontower.train_stages.augment import AugmentConfig
from regiontower.train_stages.engine import StageInterrupted
from regiontower.train_stages.pixels import PixelCache
from regiontower.train_stages.pretrain import pretrain
from regiontower.train_stages.pretrain_data import RegionItems
from regiontower.train_stages.pretrain_items import CachedItems
from regiontower.train_stages.pretrain_recipe import PretrainRecipe
from regiontower.train_stages.recipe import load_recipe
from regiontower.train_stages.record_io import read_records, write_records
from regiontower.train_stages.record_source import RecordSource
from regiontower.train_stages.region_labels import ObjectClasses
from regiontower.train_stages.scenes import write_scenes
from regiontower.train_stages.streaming import RecordStream, StreamedItems
from regiontower.train_stages.tag_bank import TagBank
from regiontower.train_stages.tokenizer import train_tokenizer
from regiontower.train_stages.webdataset import read_shard, write_shards
from regiontower.vision_towers import load_umg_clip
from regiontower.vision_towers.errors import UserError

pytest.importorskip("datasets", reason="streaming needs datasets (pip install 'regiontower[stream]')")
pytest.importorskip("webdataset", reason="shards need webdataset (pip install 'regiontower[stream]')")

COUNT = 20


class _StopAfter(TrainerCallback):
    """A signal in the middle of a run."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """Records of 20 scenes, four JSONL files of five each, and three shards of seven at most."""
    root = tmp_path_factory.mktemp("streamed")
    records = read_records(write_scenes(root, COUNT, seed=3, progress=False))
    for part in range(4):
        write_records(root / f"part{part}.jsonl", records.records[5 * part : 5 * part + 5])
    write_shards(records, root / "shards", per_shard=7)
    return root


def sources(root):
    jsonl = tuple(str(root / f"part{part}.jsonl") for part in range(4))
    shards = tuple(str(path) for path in sorted((root / "shards").glob("*.tar")))
    return {"records": RecordSource(jsonl), "webdataset": RecordSource(shards, format="webdataset")}


def take(stream, count, rank=0, processes=1):
    images = stream.rounds(rank, processes)
    return [next(images) for _ in range(count)]


def boxes_of(record):
    return tuple(region.box_xyxy for region in record.regions)


@pytest.mark.parametrize("kind", ["records", "webdataset"])
def test_a_round_has_every_record_once_and_the_next_another_order(scenes, kind):
    stream = RecordStream(sources(scenes)[kind], seed=1, buffer=6)
    everything = sorted(boxes_of(record) for record in read_records(scenes / "records.jsonl").records)
    assert sorted(boxes_of(record) for record in stream.records()) == everything
    found = [boxes_of(image.record) for image in take(stream, 2 * COUNT)]
    assert sorted(found[:COUNT]) == sorted(found[COUNT:]) == everything
    assert found[:COUNT] != found[COUNT:]
    assert found == [boxes_of(image.record) for image in take(stream, 2 * COUNT)]
    other = RecordStream(sources(scenes)[kind], seed=2, buffer=6)
    assert found != [boxes_of(image.record) for image in take(other, 2 * COUNT)]


@pytest.mark.parametrize(("kind", "processes", "each"), [("records", 2, 10), ("records", 3, 6), ("webdataset", 2, 10)])
def test_processes_divide_a_round(scenes, kind, processes, each):
    """Two processes read two of four files each; three, or two of three shards, every second or third record."""
    stream = RecordStream(sources(scenes)[kind], seed=1, buffer=6)
    parts = [{boxes_of(image.record) for image in take(stream, each, rank, processes)} for rank in range(processes)]
    assert all(len(part) == each for part in parts)
    assert len(set.union(*parts)) == processes * each


@pytest.mark.parametrize("kind", ["records", "webdataset"])
def test_streamed_items_are_the_cached_ones(scenes, kind):
    records = read_records(scenes / "records.jsonl")
    maker = RegionItems(ObjectClasses.of(records.records, "category", True), None, 6, AugmentConfig(1.0, 0.0, 0.0))
    cached = CachedItems(PixelCache.build(records, 56, progress=False), maker)
    by_boxes = {boxes_of(record): n for n, record in enumerate(records.records)}
    streamed = StreamedItems(RecordStream(sources(scenes)[kind], seed=1, buffer=6), maker, 56, (123, 117, 104))
    examples = streamed.examples(0, 1)
    for _ in range(5):
        example = next(examples)
        np.random.seed(4)
        found = streamed.item(example)
        np.random.seed(4)
        wanted = cached[by_boxes[boxes_of(example[0].record)]]
        assert found is not None and found.keys() == wanted.keys()
        assert torch.equal(found["pixel_values"], wanted["pixel_values"])
        assert torch.equal(found["boxes"], wanted["boxes"])
        assert torch.equal(found["object_labels"], wanted["object_labels"])


def test_shards_give_back_records_and_files_to_the_byte(scenes, tmp_path):
    records = read_records(scenes / "records.jsonl")
    found = [item for path in sorted((scenes / "shards").glob("*.tar")) for item in read_shard(path)]
    for (record, data), wanted in zip(found, records.records, strict=True):
        assert record.model_copy(update={"image": wanted.image}) == wanted
        assert data == records.image_path(wanted).read_bytes()
    again = write_shards(records, tmp_path, per_shard=7)
    assert [path.read_bytes() for path in again] == [
        path.read_bytes() for path in sorted((scenes / "shards").glob("*.tar"))
    ]


def test_what_is_wrong_in_a_shard_is_named(scenes, tmp_path):
    records = read_records(scenes / "records.jsonl")
    broken = tmp_path / "broken.tar"
    with tarfile.open(broken, "w") as tar:
        for number, text in enumerate(["{", "[]", json.dumps({"width": 3}), None]):
            Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
            tar.add(tmp_path / "a.png", f"{number}.png")
            if text is not None:
                (tmp_path / "a.json").write_text(text)
                tar.add(tmp_path / "a.json", f"{number}.json")
    reasons = [bad.reason for bad in read_shard(broken)]
    assert len(reasons) == 4 and "no JSON object" in reasons[1] and "height" in reasons[2]
    assert "no region record" in reasons[3]
    (tmp_path / "none.tar").write_bytes(b"no tar at all" * 100)
    for path in (tmp_path / "none.tar", tmp_path / "absent.tar"):
        with pytest.raises(UserError, match=rf"{path.name}: the shard cannot be read"):
            list(read_shard(path))
    with pytest.raises(UserError, match=r"data\.stream=true"):
        RecordSource(str(broken), format="webdataset").read()
    lost = records.records[0].model_copy(update={"image": "lost.jpg"})
    with pytest.raises(UserError, match=r"lost\.jpg"):
        write_shards(type(records)(records.path, records.root, [lost]), tmp_path / "out")


def test_an_image_that_cannot_be_read_is_passed_over_and_many_end_the_run(scenes, tmp_path):
    records = read_records(scenes / "records.jsonl").records
    root = tmp_path / "bad"
    root.mkdir()
    changed = [record.model_copy(update={"image": str(scenes / record.image)}) for record in records]
    changed[0] = records[0].model_copy(update={"image": "absent.png"})
    write_records(root / "records.jsonl", changed)
    maker = RegionItems(ObjectClasses.of(records, "category", True), None, 6, AugmentConfig(1.0, 0.0, 0.0))
    items = StreamedItems(RecordStream(RecordSource(str(root / "records.jsonl")), 0, 1), maker, 56, (0, 0, 0))
    examples = items.examples(0, 1)
    made = [items.item(next(examples)) for _ in range(COUNT)]
    assert sum(item is None for item in made) == 1
    bad = next(example for example in examples if example[0].record.image == "absent.png")
    seen = COUNT
    with pytest.raises(UserError, match=r"of 600 records are bad, more than max"):  # in so few the share says little
        while seen < 1000:
            seen += 1
            assert items.item(bad) is None
    assert seen == 600


def lines_of(path, good, bad, bad_first):
    """A file of `good` sound lines, with `bad` broken ones before or behind them."""
    lines = [['{"image": "a.png", "width": 8, "height": 8}'] * good, ["{"] * bad]
    path.write_text("\n".join(line for part in (lines[::-1] if bad_first else lines) for line in part) + "\n")
    return RecordStream(RecordSource(str(path)), 0, 1)


@pytest.mark.parametrize("bad_first", [True, False])
@pytest.mark.parametrize(("good", "bad"), [(1000, 6), (1000, 10), (1000, 11), (20, 5), (20, 6)])
def test_a_stream_takes_the_files_that_are_taken_at_once(tmp_path, good, bad, bad_first):
    """Wherever in the file its bad records stand."""
    stream = lines_of(tmp_path / "records.jsonl", good, bad, bad_first)
    if bad <= max(5, (good + bad) / 100):
        assert len(read_records(tmp_path / "records.jsonl")) == len(list(stream.records())) == good
        return
    for read in (lambda: read_records(tmp_path / "records.jsonl"), lambda: list(stream.records())):
        with pytest.raises(UserError, match=rf"{bad} of {good + bad} records are bad"):
            read()


def test_a_file_of_bad_records_is_not_read_to_its_end(tmp_path):
    stream = lines_of(tmp_path / "records.jsonl", 20_000, 5_000, True)
    with pytest.raises(UserError, match="600 of 600 records are bad"):
        list(stream.records())


def recipe(scenes, *overrides):
    size = "{hidden_size: 32, layers: 1, heads: 1, intermediate_size: 64, image_size: 56, num_region_layers: 1}"
    names = json.dumps([str(scenes / f"part{part}.jsonl") for part in range(4)])
    return load_recipe(
        "rice-nano",
        PretrainRecipe,
        [
            f"model.size={size}",
            "model.tower=null",
            "model.keep_heads=false",
            "data.object_labels=category",
            f"data.records={names}",
            "data.tokenizer=null",
            "data.stream=true",
            "data.shuffle_buffer=6",
            "train.steps=6",
            "train.batch_size=4",
            "train.log_steps=1",
            "train.save_steps=2",
            "train.threads=1",
            *overrides,
        ],
    )


def test_a_first_pass_over_all_files_finds_the_tags(scenes, tmp_path, capsys):
    """UMG-CLIP's tags are classes: those of every file are known before the first image is read."""
    records = read_records(scenes / "records.jsonl").records
    bank = TagBank.of(records)
    assert len(bank) > max(len(TagBank.of(read_records(scenes / f"part{part}.jsonl").records)) for part in range(4))
    train_tokenizer([caption for record in records for caption in record.captions], tmp_path / "tokenizer", 512)
    small = ["umg_clip.text={embed_dim: 16, text_hidden: 16, text_layers: 1, text_heads: 2}", "objective=umg_clip"]
    steps = [f"data.tokenizer={tmp_path}/tokenizer", "train.steps=2"]
    for kind in ("records", "webdataset"):
        source = sources(scenes)[kind]
        names = [f"data.records={json.dumps(source.records)}", f"data.format={source.format}"]
        wanted = recipe(scenes, *(f"model.{override}" for override in small), *steps, *names)
        result = pretrain(wanted, tmp_path / kind, device="cpu")
        assert f"images are streamed; {len(bank)} tags" in capsys.readouterr().err
        assert {"image_tag_top1", "region_tag_top1", "pixel_tag_top1"} <= set(result.metrics)
        assert load_umg_clip(tmp_path / kind).config.text_config.hidden_size == 16


def test_a_streamed_run_resumes_to_the_bit_and_is_measured_on_the_way(scenes, tmp_path):
    from regiontower.eval.probe import neighbours_during

    held_out = (f"eval.records={scenes}/records.jsonl", "eval.every=4", "eval.batch_size=8")
    wanted = recipe(scenes, *held_out, "data.view_schedule=[[0.5, 28]]")
    probe = neighbours_during("category")
    result = pretrain(wanted, tmp_path / "whole", device="cpu", probe=probe)
    rows = [json.loads(line) for line in (tmp_path / "whole" / "eval.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [4, 6]
    assert set(rows[0]["figures"]) == {"loss", "object_top1", "regions", "knn_top1"}
    assert result.metrics["held_out_loss"] == rows[-1]["figures"]["loss"]
    assert rows[0]["figures"]["loss"] != rows[1]["figures"]["loss"]

    with pytest.raises(StageInterrupted):
        pretrain(wanted, tmp_path / "cut", device="cpu", probe=probe, callbacks=[_StopAfter(3)])
    pretrain(wanted, tmp_path / "cut", device="cpu", probe=probe)
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    plain = recipe(scenes, "data.view_schedule=[[0.5, 28]]")
    pretrain(plain, tmp_path / "plain", device="cpu")
    other = load_file(tmp_path / "plain" / "model.safetensors")
    assert all(torch.equal(one[name], other[name]) for name in one)  # measuring changes nothing
