"""SIGKILL where a run changes what others see; then the run again: the same bytes as in one go.

All kill points: `python -m pytest -n 0 -m slow tests/train_stages/label/test_label_kills.py`.
"""

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
import traceback
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from regiontower.train_stages.label import ImageSource, RunConfig, find_engine, label_images
from regiontower.train_stages.label.centres import KMeansConfig
from regiontower.train_stages.label.object_clusters import label_objects
from regiontower.train_stages.label.objects import ObjectsConfig
from regiontower.train_stages.label.ocr import OcrConfig
from regiontower.train_stages.label.one_run import only_run
from regiontower.train_stages.record_io import read_records, write_records
from regiontower.train_stages.records import Record, Region
from regiontower.vision_towers import RiceVisionConfig, RiceVisionModel
from regiontower.vision_towers.errors import UserError

pytestmark = pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork")

HERE = {"device": "cpu", "progress": False}


def in_child(call):
    """The exit code of a forked process that does this."""

    def work():
        try:
            call()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)

    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    child.join(200)
    child.kill()
    child.join()
    return child.exitcode


def label_signs(signs, out, **choices):
    run = RunConfig(**{"per_shard": 2, "batch_size": 1, **HERE, **choices})
    return label_images(find_engine("rice-ocr"), OcrConfig(), ImageSource(signs), out, run)


@pytest.mark.slow  # two processes import everything anew
@pytest.mark.timeout(900)
def test_a_killed_run_of_two_processes_goes_on(signs, read_folder, tmp_path):
    """Its workers outlive it for a moment, while the next run is on its way."""
    pytest.importorskip("rapidocr")
    pytest.importorskip("onnxruntime")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    arguments = {"target": label_signs, "args": (signs, killed), "kwargs": {"processes": 2}}
    process = multiprocessing.get_context("fork").Process(**arguments)
    process.start()
    while not list((killed / "done").glob("*")) and process.is_alive():
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL and list((killed / "done").glob("*"))
    found = label_signs(signs, killed)
    wanted = label_signs(signs, whole)
    assert read_folder(killed) == read_folder(whole)
    assert 0 < found.labelled_now < wanted.labelled_now == 7
    assert (found.records, found.regions, len(found.bad)) == (6, 6, 1)
    records = [record for path in found.shards for record in read_records(path, check_images=True).records]
    texts = {Path(record.image).stem: [region.ocr for region in record.regions] for record in records}
    assert texts == {path.stem: [path.stem] for path in signs.glob("[A-Z]*.png")} and len(texts) == 6
    for record in records:
        x0, y0, x1, y1 = record.regions[0].box_xyxy
        assert 20 < x0 < 40 and 25 < y0 < 45 and 100 < x1 < 180 and 50 < y1 < 75
    (bad,) = json.loads((killed / "bad_images.json").read_text())
    assert bad["image"].endswith("broken.png") and bad["reason"]


@pytest.fixture(scope="module")
def objects(tmp_path_factory, read_folder):
    """`objects(form)`: `label(name, die_at)`, which writes a folder of that name and is killed before its rename number
    `die_at`; `read(name)`, the bytes of such a folder; the names that a whole run gives its files, one after the other;
    and its bytes. All folders lie side by side, for paths in them are relative."""
    pytest.importorskip("faiss")
    folder = tmp_path_factory.mktemp("objects")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    tower = RiceVisionConfig(**sizes, patch_size=14, image_size=56, num_region_layers=1, initializer_range=0.2)
    RiceVisionModel(tower).save_pretrained(folder / "tower")
    (folder / "photos").mkdir()
    for number in range(4):
        noise = np.random.default_rng(number).integers(0, 256, (90, 120, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / "photos" / f"{number}.png")
    regions = [Region(box_xyxy=(10 * i, 0, 10 * i + 40, 60)) for i in range(4)]
    records = [Record(image=f"{n}.png", width=120, height=90, regions=regions) for n in range(4)]
    write_records(folder / "photos" / "records.jsonl", records)
    source = ImageSource(folder / "photos" / "records.jsonl", "records")
    config = ObjectsConfig(
        str(folder / "tower"), "record", image_min_edge=1, box_min_edge=1, feature="region", nms_iou=1.0
    )

    @cache
    def make(form):
        run = RunConfig(form, per_shard=2, batch_size=2, **HERE)

        def label(name, die_at=None, report=None):
            names, out = [], folder / form / name

            def counted(call):
                def moved(source, target, *more, **options):
                    if len(names) == die_at:
                        os.kill(os.getpid(), signal.SIGKILL)
                    names.append(os.path.relpath(target, out))
                    return call(source, target, *more, **options)

                return moved

            # In a child alone. Path.replace and Path.rename call these.
            os.replace, os.rename = counted(os.replace), counted(os.rename)
            label_objects(config, KMeansConfig(6, branches=2), source, out, run)
            if report is not None:
                report.write_text(json.dumps(names))

        def read(name):
            return read_folder(folder / form / name)

        report = folder / f"{form}.json"
        assert in_child(lambda: label("whole", report=report)) == 0
        return label, read, json.loads(report.read_text()), read("whole")

    return make


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("form", ["jsonl", "webdataset"])
def test_object_labels_survive_a_kill_before_any_rename(objects, form, every):
    """Plan, regions, features, branches, centres, shards, labels.json, page: each is moved to its place by a rename.
    The fast one: the last rename of each kind; of tar files only those kinds that JSONL has not."""
    if form == "webdataset":
        pytest.importorskip("webdataset")
    label, read, names, wanted = objects(form)
    last = {re.sub(r"\d+", "N", name): place for place, name in enumerate(names)}
    assert len(names) > 12 and len(last) > 8
    places = range(len(names)) if every else [last[kind] for kind in last if form == "jsonl" or "tar" in kind]
    assert len(places) > 0
    for place in places:
        name, target = f"killed-{every}-{place}", names[place]
        assert in_child(lambda name=name, place=place: label(name, place)) == -signal.SIGKILL, target
        assert in_child(lambda name=name: label(name)) == 0, target
        found = read(name)
        assert found.keys() == wanted.keys(), (target, found.keys() ^ wanted.keys())
        assert [name for name in wanted if found[name] != wanted[name]] == [], target


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
        (tmp_path / "other name").symlink_to(tmp_path / "out")
        for name in ("out", "other name"):
            with pytest.raises(UserError, match="another run is writing"), only_run(tmp_path / name):
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
