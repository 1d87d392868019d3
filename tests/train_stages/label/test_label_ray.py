"""The same shards on a Ray cluster of this machine with two workers."""

import os
import signal

import psutil
import pytest
from PIL import Image, ImageDraw, ImageFont

from regiontower.train_stages.label import ImageSource, RunConfig, find_engine, label_images
from regiontower.train_stages.label import run as runner
from regiontower.train_stages.label.ocr import OcrConfig
from regiontower.train_stages.label.processes import Job
from regiontower.train_stages.label.ray_cluster import label_on_ray
from regiontower.vision_towers.errors import UserError

ray = pytest.importorskip("ray", reason="Ray is not installed; pip install 'regiontower[ray]'")
pytest.importorskip("ray.data", reason="Ray is here without Ray Data; pip install 'regiontower[ray]'")
pytest.importorskip("rapidocr")
pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.timeout(900)  # a cluster and its workers start slowly on a busy machine
WORDS = ("HELLO", "WORLD", "TOWER", "RIVER", "HOUSE", "GREEN")


@pytest.fixture(scope="module")
def signs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("signs")
    for word in WORDS:
        picture = Image.new("RGB", (200, 100), "white")
        ImageDraw.Draw(picture).text((30, 30), word, fill="black", font=ImageFont.load_default(30))
        picture.save(folder / f"{word}.png")
    (folder / "broken.png").write_bytes((folder / "HELLO.png").read_bytes()[:150])
    return folder


@pytest.fixture(scope="module")
def cluster():
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(num_cpus=2, include_dashboard=False, logging_level="error", log_to_driver=False)
    yield
    ray.shutdown()


def content(out):
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def label(signs, out, **choices):
    run = RunConfig(**{"per_shard": 2, "batch_size": 1, "device": "cpu", "progress": False, **choices})
    return label_images(find_engine("rice-ocr"), OcrConfig(), ImageSource(signs), out, run)


def test_two_workers_write_what_one_process_writes(signs, cluster, tmp_path, monkeypatch):
    """Also when a worker is killed on the way: its shard goes to another one."""
    commit, killed = runner.commit_shard, []
    (raylet,) = [each.pid for each in psutil.Process().children(recursive=True) if each.name() == "raylet"]

    def kill_one_then_commit(folder, form, part):
        if not killed:
            workers = [each for each in psutil.process_iter() if "ray::MapWorker" in " ".join(each.cmdline())]
            killed.extend(each.pid for each in workers if raylet in (parent.pid for parent in each.parents()))
            os.kill(killed[0], signal.SIGKILL)
        commit(folder, form, part)

    monkeypatch.setattr(runner, "commit_shard", kill_one_then_commit)
    found = label(signs, tmp_path / "ray", engine="ray", processes=2)
    monkeypatch.undo()
    label(signs, tmp_path / "local")
    assert killed
    assert content(tmp_path / "ray") == content(tmp_path / "local")
    assert (found.records, found.regions, len(found.bad)) == (6, 6, 1)
    assert label(signs, tmp_path / "ray", engine="ray", processes=2).labelled_now == 0


def test_what_a_user_gets_wrong_is_said_in_a_sentence(cluster, tmp_path):
    """Where it is found: in the worker."""
    job = Job("none", {}, str(tmp_path), "jsonl", 1, "cpu", "fp32", 1, "key")
    with pytest.raises(UserError, match=r"^there is no label engine 'none'"):
        list(label_on_ray(job, [0], 1, lambda images: None))
