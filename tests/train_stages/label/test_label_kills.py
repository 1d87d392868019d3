"""SIGKILL at every place where a run changes what others see; then the run again: the same bytes as in one go."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image, ImageDraw, ImageFont

from regiontower.train_stages.label import ImageSource, RunConfig, find_engine, label_images
from regiontower.train_stages.label.one_run import only_run
from regiontower.train_stages.record_io import read_records
from regiontower.vision_towers.errors import UserError

WORDS = ("HELLO", "WORLD", "TOWER", "RIVER", "HOUSE", "GREEN")
HERE = {"device": "cpu", "progress": False}


@pytest.fixture
def signs(tmp_path):
    """Six pictures of a word each, and one that is broken."""
    folder = tmp_path / "signs"
    folder.mkdir()
    for word in WORDS:
        picture = Image.new("RGB", (200, 100), "white")
        ImageDraw.Draw(picture).text((30, 30), word, fill="black", font=ImageFont.load_default(30))
        picture.save(folder / f"{word}.png")
    whole = (folder / "HELLO.png").read_bytes()
    (folder / "broken.png").write_bytes(whole[: len(whole) // 2])
    return folder


def content(out):
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def label(signs, out, **choices):
    from regiontower.train_stages.label.ocr import OcrConfig

    run = RunConfig(**{"per_shard": 2, "batch_size": 1, **HERE, **choices})
    return label_images(find_engine("rice-ocr"), OcrConfig(), ImageSource(signs), out, run)


@pytest.mark.timeout(900)  # two processes import everything anew
def test_a_killed_run_of_two_processes_goes_on(signs, tmp_path):
    """Its workers outlive it for a moment, while the next run is on its way."""
    pytest.importorskip("rapidocr")
    pytest.importorskip("onnxruntime")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    arguments = {"target": label, "args": (signs, killed), "kwargs": {"processes": 2}}
    process = multiprocessing.get_context("fork").Process(**arguments)
    process.start()
    while not list((killed / "done").glob("*")) and process.is_alive():
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL and list((killed / "done").glob("*"))
    found = label(signs, killed)
    wanted = label(signs, whole)
    assert content(killed) == content(whole)
    assert 0 < found.labelled_now < wanted.labelled_now == 7
    assert (found.records, found.regions, len(found.bad)) == (6, 6, 1)
    records = [record for path in found.shards for record in read_records(path, check_images=True).records]
    texts = {Path(record.image).stem: [region.ocr for region in record.regions] for record in records}
    assert texts == {word: [word] for word in WORDS}
    for record in records:
        x0, y0, x1, y1 = record.regions[0].box_xyxy
        assert 20 < x0 < 40 and 25 < y0 < 45 and 100 < x1 < 180 and 50 < y1 < 75
    (bad,) = json.loads((killed / "bad_images.json").read_text())
    assert bad["image"].endswith("broken.png") and bad["reason"]


KILLS = '''
import os, shutil, signal, sys
from pathlib import Path

import numpy as np
from PIL import Image

from regiontower.train_stages.label import ImageSource, RunConfig
from regiontower.train_stages.label.centres import KMeansConfig
from regiontower.train_stages.label.object_clusters import label_objects
from regiontower.train_stages.label.objects import ObjectsConfig
from regiontower.train_stages.records import Record, Region

folder, form = Path(sys.argv[1]), sys.argv[2]
(folder / "photos").mkdir()
for number in range(4):
    noise = np.random.default_rng(number).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "photos" / f"{number}.png")
regions = [Region(box_xyxy=(10 * i, 0, 10 * i + 40, 60)) for i in range(4)]
lines = [Record(image=f"{n}.png", width=120, height=90, regions=regions).model_dump_json() for n in range(4)]
(folder / "records.jsonl").write_text("\\n".join(lines) + "\\n")
source = ImageSource(folder / "records.jsonl", "records", folder / "photos")
config = ObjectsConfig(str(folder / "tower"), "record", image_min_edge=1, box_min_edge=1, feature="region", nms_iou=1.0)
run = RunConfig(form, per_shard=2, batch_size=2, device="cpu", progress=False)
rename, replace = Path.rename, os.replace


def label(out, die_at=None):
    """Killed before the rename number `die_at`; returns how many there were."""
    count = 0

    def counted(call):
        def moved(*names):
            nonlocal count
            if count == die_at:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1
            return call(*names)

        return moved

    os.replace, Path.rename = counted(replace), counted(rename)
    Path.replace = counted(rename)
    label_objects(config, KMeansConfig(6, branches=2), source, out, run)
    return count


def content(out):
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def in_child(call):
    """Forked before any thread is started here."""
    child = os.fork()
    if child == 0:
        call()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def whole():
    (folder / "count").write_text(str(label(folder / "whole")))


assert in_child(whole) == 0
count, wanted = int((folder / "count").read_text()), content(folder / "whole")
for place in range(count):
    out = folder / f"killed-{place}"
    assert in_child(lambda: label(out, place)) == -signal.SIGKILL, place
    assert in_child(lambda: label(out)) == 0, place
    found = content(out)
    assert found.keys() == wanted.keys(), (place, found.keys() ^ wanted.keys())
    assert [name for name in wanted if found[name] != wanted[name]] == [], place
print(count)
'''


@pytest.mark.timeout(900)
@pytest.mark.parametrize("form", ["jsonl", "webdataset"])
def test_object_labels_survive_a_kill_before_any_rename(form, tmp_path):
    """Regions, features, branches, centres, shards, labels.json, page: each is moved to its place by a rename."""
    pytest.importorskip("faiss")
    if form == "webdataset":
        pytest.importorskip("webdataset")
    import torch

    from regiontower.vision_towers import RiceVisionConfig, RiceVisionModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = RiceVisionConfig(**sizes, patch_size=14, image_size=56, num_region_layers=1, initializer_range=0.2)
    RiceVisionModel(config).save_pretrained(tmp_path / "tower")
    command = [sys.executable, "-c", KILLS, str(tmp_path), form]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout.splitlines()[-1]) > 12


def test_one_run_at_a_time(tmp_path):
    with only_run(tmp_path / "out"):
        (tmp_path / "out" / "something").touch()
        code = f"""
from pathlib import Path
from filelock import FileLock, Timeout
try:
    FileLock("{tmp_path / "out" / ".lock"}").acquire(timeout=0)
except Timeout:
    print("taken")
"""
        assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "taken\n"
        with pytest.raises(UserError, match="another run is writing"), only_run(tmp_path / "out"):
            pass
    with only_run(tmp_path / "out"):
        pass
    with only_run(tmp_path / "empty"):
        pass
    assert not (tmp_path / "empty").exists()  # nothing was written
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file"), only_run(tmp_path / "file"):
        pass
    assert Path(tmp_path / "out" / "something").exists()
