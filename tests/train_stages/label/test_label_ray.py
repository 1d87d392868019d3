"""The same shards on a Ray cluster of this machine with two workers.

With a worker that is killed: `python -m pytest -n 0 -m slow tests/train_stages/label/test_label_ray.py`.
"""

import os
import signal
from contextlib import suppress
from dataclasses import asdict

import psutil
import pytest

from regiontower.train_stages.label import ImageSource, RunConfig, find_engine, label_images
from regiontower.train_stages.label import run as runner
from regiontower.train_stages.label.ocr import OcrConfig
from regiontower.train_stages.label.processes import Job
from regiontower.train_stages.label.ray_cluster import ShardActor, label_on_ray
from regiontower.vision_towers.errors import UserError

ray = pytest.importorskip("ray", reason="Ray is not installed; pip install 'regiontower[ray]'")
pytest.importorskip("ray.data", reason="Ray is here without Ray Data; pip install 'regiontower[ray]'")
pytest.importorskip("rapidocr")
pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.timeout(900)  # a cluster and its workers start slowly on a busy machine


UNKNOWN = Job("none", {}, "out", "jsonl", 1, "cpu", "fp32", 1, "key")


@pytest.fixture(scope="module")
def cluster():
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(num_cpus=2, include_dashboard=False, logging_level="error", log_to_driver=False)
    yield
    ray.shutdown()


def label(signs, out, **choices):
    run = RunConfig(**{"per_shard": 2, "batch_size": 1, "device": "cpu", "progress": False, **choices})
    return label_images(find_engine("rice-ocr"), OcrConfig(), ImageSource(signs), out, run)


def test_two_workers_write_what_one_process_writes(signs, read_folder, cluster, tmp_path):
    found = label(signs, tmp_path / "ray", engine="ray", processes=2)
    label(signs, tmp_path / "local")
    assert read_folder(tmp_path / "ray") == read_folder(tmp_path / "local")
    assert (found.records, found.regions, len(found.bad)) == (6, 6, 1)
    assert label(signs, tmp_path / "ray", engine="ray", processes=2).labelled_now == 0


@pytest.mark.slow
def test_the_shard_of_a_killed_worker_goes_to_another_one(signs, read_folder, cluster, tmp_path, monkeypatch):
    commit, killed = runner.commit_shard, []
    (raylet,) = [each for each in psutil.Process().children(recursive=True) if each.name() == "raylet"]

    def kill_one_then_commit(folder, form, part):
        for worker in [] if killed else raylet.children(recursive=True):
            with suppress(psutil.Error):  # others come and go
                if "ray::MapWorker" in " ".join(worker.cmdline()):
                    killed.append(worker.pid)
        if len(killed) > 1:
            os.kill(killed[0], signal.SIGKILL)
        commit(folder, form, part)

    monkeypatch.setattr(runner, "commit_shard", kill_one_then_commit)
    label(signs, tmp_path / "ray", engine="ray", processes=2)
    monkeypatch.undo()
    label(signs, tmp_path / "local")
    assert len(killed) == 2
    assert read_folder(tmp_path / "ray") == read_folder(tmp_path / "local")


def test_what_a_user_gets_wrong_is_said_in_a_sentence_where_it_is_found(tmp_path, monkeypatch):
    """In the worker: raised there, Ray would wrap it into a page of its own."""
    monkeypatch.chdir(tmp_path)
    actor = ShardActor(asdict(UNKNOWN), str(tmp_path))
    assert actor({"index": 0})["error"].startswith("there is no label engine 'none'")


@pytest.mark.slow
def test_what_a_user_gets_wrong_comes_back_from_the_worker(cluster):
    with pytest.raises(UserError, match=r"^there is no label engine 'none'"):
        list(label_on_ray(UNKNOWN, [0], 1, lambda images: None))
