"""The runner of `label`: every image once, whatever happens on the way."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from dataclasses import asdict, replace

import numpy as np
import pytest
from PIL import Image
from pydantic.dataclasses import dataclass

from regiontower.train_stages.bad_records import BadRecord
from regiontower.train_stages.label import (
    Engine,
    ImageSource,
    Labelled,
    PassedOver,
    RunConfig,
    label_images,
)
from regiontower.train_stages.label import processes as local
from regiontower.train_stages.label.processes import Job, _ask, label_in_processes
from regiontower.train_stages.label.shard import ShardPart, ShardResult
from regiontower.train_stages.record_io import read_records, write_records
from regiontower.train_stages.records import Record, Region
from regiontower.train_stages.webdataset import read_shard
from regiontower.vision_towers.errors import UserError


@dataclass(frozen=True)
class GrayConfig:
    """die_at: the image before which the process is killed."""

    darkest: int = 0
    die_at: int | None = None


class GrayLabeller:
    """A region for each image: its left half, with the mean of its pixels as score."""

    def __init__(self, config, workplace):
        self.config, self.workplace, self.seen = config, workplace, 0

    def label(self, images, records):
        results = []
        for image, record in zip(images, records, strict=True):
            if self.seen == self.config.die_at:
                os.kill(os.getpid(), signal.SIGKILL)
            self.seen += 1
            mean = float(np.asarray(image).mean())
            region = Region(box_xyxy=(0, 0, image.width / 2, image.height), score=mean, source=self.workplace.source)
            labelled = record.model_copy(update={"regions": [*record.regions, region]})
            rows = np.full((len(labelled.regions), 2), mean, np.float32)
            results.append(Labelled(labelled, rows) if mean >= self.config.darkest else PassedOver("too dark"))
        return results


# What is killed must be taken up as the same run, so `die_at` is no part of the facts.
GRAY = Engine("gray", GrayConfig, GrayLabeller, lambda config: {"models": {}}, ("regions.score",))
QUIET = {"device": "cpu", "progress": False}


def paint(path, value, size=(40, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, value, value)).save(path)


@pytest.fixture
def photos(tmp_path):
    """Eleven pictures in three folders, and a file that is none."""
    for number in range(11):
        paint(tmp_path / "photos" / f"f{number % 3}" / f"{number:02d}.png", 20 * number)
    (tmp_path / "photos" / "notes.txt").write_text("none")
    return tmp_path / "photos"


def run(photos, out, *, config=None, source=None, engine=GRAY, **choices):
    choices = {"per_shard": 3, "batch_size": 2, **QUIET, **choices}
    return label_images(engine, config or GrayConfig(), source or ImageSource(photos), out, RunConfig(**choices))


def content(out):
    """Bytes of everything but the plan's folder, by name."""
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_every_image_of_a_folder_is_labelled_once(photos, tmp_path):
    result = run(photos, tmp_path / "out")
    assert [path.name for path in result.shards] == ["00000.jsonl", "00001.jsonl", "00002.jsonl", "00003.jsonl"]
    records = [record for path in result.shards for record in read_records(path, check_images=True).records]
    assert sorted(os.path.basename(record.image) for record in records) == [f"{n:02d}.png" for n in range(11)]
    for record in records:
        number = int(os.path.basename(record.image)[:2])
        assert record.regions[0].score == pytest.approx(20 * number)
    labels = json.loads((tmp_path / "out" / "labels.json").read_text())
    assert {region.source for record in records for region in record.regions} == set(labels)
    assert (result.images, result.records, result.regions, result.bad) == (11, 11, 11, [])
    assert result.labelled_now == 11
    assert not (tmp_path / "out" / ".parts").exists()


def test_the_order_of_rows_is_that_of_regions(photos, tmp_path):
    from regiontower.train_stages.label.shard import read_rows

    result = run(photos, tmp_path / "out")
    for index, path in enumerate(result.shards):
        scores = [region.score for record in read_records(path).records for region in record.regions]
        np.testing.assert_allclose(read_rows(tmp_path / "out", index)[:, 0], scores)


@pytest.mark.parametrize("form", ["jsonl", "webdataset"])
@pytest.mark.parametrize("die_at", [0, 2, 3, 7, 10])
def test_a_killed_run_goes_on(photos, tmp_path, die_at, form):
    """SIGKILL before any image; then the run again: the same bytes as a run in one go, nothing left over."""
    if form == "webdataset":
        pytest.importorskip("webdataset")
    whole = run(photos, tmp_path / "whole", form=form)
    engine = replace(GRAY, open=lambda config, place: GrayLabeller(GrayConfig(0, die_at), place))
    context = multiprocessing.get_context("fork")
    process = context.Process(target=run, args=(photos, tmp_path / "killed"), kwargs={"engine": engine, "form": form})
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    result = run(photos, tmp_path / "killed", form=form)
    assert result.labelled_now == 11 - die_at // 3 * 3  # finished shards are kept
    assert content(tmp_path / "killed") == content(tmp_path / "whole")
    assert (result.records, result.regions) == (whole.records, whole.regions)


def test_a_shard_without_its_note_is_made_again(photos, tmp_path):
    """What a kill between the last two renames leaves."""
    out = tmp_path / "out"
    run(photos, out)
    before = content(out)
    (out / "done" / "00001.json").unlink()
    (out / ".parts" / "00001").mkdir(parents=True)
    assert run(photos, out).labelled_now == 3
    assert content(out) == before


def test_an_unfinished_plan_is_made_again(photos, tmp_path):
    (tmp_path / "out" / ".plan.part").mkdir(parents=True)
    (tmp_path / "out" / ".plan.part" / "00000.jsonl").write_text("half a li")
    assert run(photos, tmp_path / "out").records == 11


def test_another_setting_is_refused(photos, tmp_path):
    out = tmp_path / "out"
    run(photos, out)
    with pytest.raises(UserError, match=r"settings\.darkest: 0 there, 50 now.*--overwrite"):
        run(photos, out, config=GrayConfig(50))
    with pytest.raises(UserError, match="per_shard: 3 there, 4 now"):
        run(photos, out, per_shard=4)
    paint(photos / "new.png", 1)
    with pytest.raises(UserError, match="images: 11 there, 12 now"):
        run(photos, out)
    (out / "mine.txt").write_text("stays")
    result = run(photos, out, config=GrayConfig(50), overwrite=True)
    assert (result.images, result.records, result.passed_over) == (12, 8, {"too dark": 4})
    assert (out / "mine.txt").exists()


def test_a_folder_with_other_records_is_refused(photos, tmp_path):
    write_records(tmp_path / "out" / "mine.jsonl", [Record(image="a.png", width=1, height=1)])
    with pytest.raises(UserError, match="another origin"):
        run(photos, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "mine.jsonl").exists()


def test_a_few_bad_images_are_named_and_many_stop_the_run(photos, tmp_path):
    (photos / "empty.png").touch()
    whole = (photos / "f0" / "00.png").read_bytes()
    (photos / "half.png").write_bytes(whole[: len(whole) // 2])  # its header is sound
    result = run(photos, tmp_path / "out")
    assert (result.images, result.records, len(result.bad)) == (13, 11, 2)
    assert "empty.png" in result.report()["bad_named"] and "half.png" in result.report()["bad_named"]
    listed = json.loads((tmp_path / "out" / "bad_images.json").read_text())
    assert sorted(os.path.basename(row["image"]) for row in listed) == ["empty.png", "half.png"]
    assert all(row["reason"] for row in listed)
    assert run(photos, tmp_path / "out").report()["bad"] == 2  # finished: still told
    for number in range(5):
        (photos / f"half{number}.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"[67] of 18 records are bad"):
        run(photos, tmp_path / "bad")


def test_no_images(tmp_path):
    (tmp_path / "photos").mkdir()
    with pytest.raises(UserError, match="no image in this folder"):
        run(tmp_path / "photos", tmp_path / "out")
    with pytest.raises(UserError, match="no such folder"):
        run(tmp_path / "nothing", tmp_path / "out")


def test_near_duplicates_are_left_out(tmp_path, noise_image):
    pytest.importorskip("faiss")
    photos = tmp_path / "photos"
    photos.mkdir()
    for seed in range(3):
        picture = noise_image(6, 5, seed).resize((200, 160), Image.Resampling.BICUBIC)
        picture.save(photos / f"{seed}a.png")
        picture.resize((100, 80)).save(photos / f"{seed}b.jpg", quality=70)
    result = run(photos, tmp_path / "out", near_duplicates=16)
    kept = [os.path.basename(record.image) for path in result.shards for record in read_records(path).records]
    assert kept == ["0a.png", "1a.png", "2a.png"]
    assert (result.images, result.passed_over) == (6, {"near duplicate": 3})


def test_lines_and_borders_are_left_out(photos, tmp_path):
    """PP-OCR enlarges such a picture to gigabytes (2 x 1900 px: 5.4 GB), or fails at it, as some captioners do."""
    paint(photos / "wide.png", 9, (410, 10))
    paint(photos / "tall.png", 9, (2, 1900))
    paint(photos / "line.png", 9, (400, 10))
    result = run(photos, tmp_path / "out")
    assert (result.images, result.records, result.passed_over) == (14, 12, {"too thin": 2})
    with pytest.raises(UserError, match="max_elongation: 40"):
        run(photos, tmp_path / "out", max_elongation=200)
    assert run(photos, tmp_path / "all", max_elongation=1000).records == 14
    (tmp_path / "thin").mkdir()
    paint(tmp_path / "thin" / "tall.png", 9, (2, 1900))
    with pytest.raises(UserError, match=r"none of its 1 images can be used \(too thin\)"):
        run(tmp_path / "thin", tmp_path / "none")


def test_labels_are_added_to_records(photos, tmp_path):
    first = run(photos, tmp_path / "first")
    source = ImageSource(first.shards[0], "records")
    again = run(None, tmp_path / "deep" / "second", config=GrayConfig(1), source=source)
    records = read_records(again.shards[0], check_images=True).records
    assert [len(record.regions) for record in records] == [2, 2]  # the black one is too dark
    labels = json.loads((tmp_path / "deep" / "second" / "labels.json").read_text())
    assert {region.source for record in records for region in record.regions} == set(labels)
    assert len(labels) == 2


def test_webdataset_shards_hold_their_images(photos, tmp_path):
    pytest.importorskip("webdataset")
    result = run(photos, tmp_path / "out", form="webdataset")
    found = [item for path in result.shards for item in read_shard(path)]
    assert len(found) == 11 and all(len(data) > 50 for _, data in found)
    assert [path.name for path in result.shards] == ["00000.tar", "00001.tar", "00002.tar", "00003.tar"]


def say(text, status=0):
    """A worker that says this, whatever it is asked."""
    code = f"import sys; sys.stdin.readline(); print({text!r}); sys.exit({status})"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-c", code], **pipes, text=True)


def test_what_a_worker_says():
    result = ShardResult(3, 1, 2, {"too dark": 1}, [BadRecord("a.png", "it is empty")])
    part = ShardPart("00003-ab", result)
    answer = "images 2\nimages 1\ndone " + json.dumps(asdict(part))
    assert list(_ask(say(answer), 3)) == [2, 1, part]
    with pytest.raises(UserError, match=r"^no “model” there$"):
        list(_ask(say("images 2\nerror " + json.dumps("no “model” there")), 3))
    with pytest.raises(RuntimeError, match="exit status 7"):
        list(_ask(say("images 2", 7), 3))


def test_the_cores_are_shared_by_the_processes_that_there_are(monkeypatch):
    """One shard needs one process, which has all of them."""
    started, part = [], ShardPart("00003-ab", ShardResult(3, 1, 2, {}, []))

    def start(job, number, processes):
        started.append((number, processes))
        return say("done " + json.dumps(asdict(part)))

    monkeypatch.setattr(local, "_start", start)
    job = Job("gray", {}, "out", "jsonl", 1, "cpu", "fp32", -1, "key")
    assert list(label_in_processes(job, [3], 8, lambda images: None)) == [part] and started == [(0, 1)]
