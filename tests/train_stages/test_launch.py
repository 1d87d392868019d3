"""Launch files: accelerate reads each of them and would start what it promises."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env
from safetensors.torch import load_file

from regiontower.train_stages.engine.run_dir import checkpoints
from regiontower.train_stages.launch import launch_file, launch_names
from regiontower.train_stages.scenes import write_scenes
from regiontower.vision_towers.errors import UserError

KINDS = {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}


def test_there_is_a_file_for_each_way_and_its_place_is_printed():
    assert launch_names() == sorted(KINDS)
    shown = subprocess.run(
        [sys.executable, "-m", "regiontower.train_stages.launch", "fsdp2"], capture_output=True, text=True, timeout=120
    )
    assert shown.stdout.strip() == str(launch_file("fsdp2"))
    with pytest.raises(UserError, match="no launch file 'fsdp1'; there are ddp, fsdp2, zero2, zero3"):
        launch_file("fsdp1")


@pytest.mark.parametrize("name", KINDS)
def test_accelerate_reads_the_file(name):
    config = load_config_from_file(str(launch_file(name)))  # it refuses keys that it does not know
    assert isinstance(config, ClusterConfig)
    assert config.distributed_type == KINDS[name] and config.num_processes == 8
    if name.startswith("zero"):
        assert config.deepspeed_config["zero_stage"] == int(name[-1])
        assert config.deepspeed_config.get("zero3_save_16bit_model", False) is (name == "zero3")


def parsed(name: str) -> argparse.Namespace:
    """The arguments of `accelerate launch` with this file, as it sees them itself before it starts processes."""
    arguments = launch_command_parser().parse_args(["--config_file", str(launch_file(name)), "train.py"])
    return _validate_launch_command(arguments)[0]


def test_fsdp2_shards_the_blocks_of_tower_and_language_model(tiny_mllm, monkeypatch):
    """Under the launched environment the plugin is FSDP2's and finds the blocks that have to be wrapped."""
    environment = prepare_multi_gpu_env(parsed("fsdp2"))
    assert environment["ACCELERATE_USE_FSDP"] == "true" and environment["FSDP_VERSION"] == "2"
    for key, value in environment.items():
        if key.startswith("FSDP") or key.startswith("ACCELERATE"):
            monkeypatch.setenv(key, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
    plugin.set_auto_wrap_policy(tiny_mllm[0])
    kinds = {kind.__name__ for kind in plugin.auto_wrap_policy.keywords["transformer_layer_cls"]}
    modules = {type(module).__name__ for module in tiny_mllm[0].modules()}
    assert "LlamaDecoderLayer" in kinds and any("EncoderLayer" in kind for kind in kinds) and kinds <= modules


def launched(mllm: Path, scenes: Path, run_dir: Path, steps: int) -> list[str]:
    """The command of the docs. Without GPUs its processes find the CPU and gloo; accelerate's own `--cpu` would start
    one process, whatever the number."""
    sets = [
        f"model.mllm={mllm}",
        f"data.records={scenes}",
        f"train.steps={steps}",
        "train.batch_size=2",
        "train.threads=1",
        "train.log_steps=1",
        "train.compile=false",
        "train.precision=fp32",
    ]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(launch_file("ddp"))]
    launch += ["--num_processes", "2", "-m", "regiontower", "instruct", "instruct-nano"]
    return [*launch, "--out", str(run_dir), "--device", "cpu", *(word for pair in sets for word in ("--set", pair))]


@pytest.mark.slow
def test_accelerate_launch_trains_in_two_processes(tiny_mllm_dir, tmp_path):
    scenes = write_scenes(tmp_path / "scenes", 8, 0, preset="easy", progress=False)
    command = launched(tiny_mllm_dir, scenes, tmp_path / "run", 3)
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=280, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    stage = json.loads((tmp_path / "run" / "stage.json").read_text())
    assert stage["machine"]["processes"] == 2 and stage["status"] == "finished" and stage["samples"] == 12
    assert all(torch.isfinite(value).all() for value in load_file(tmp_path / "run" / "model.safetensors").values())


@pytest.mark.slow
def test_sigterm_to_a_whole_launched_job_saves_a_checkpoint(tiny_mllm_dir, tmp_path):
    """As a scheduler stops it: launcher and processes get the signal, and the processes the launcher's once more."""
    scenes = write_scenes(tmp_path / "scenes", 8, 0, preset="easy", progress=False)
    command = launched(tiny_mllm_dir, scenes, tmp_path / "run", 2000)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (tmp_path / "said").open("w") as said:
        job = subprocess.Popen(command, stdout=said, stderr=said, env=environment, start_new_session=True)
    for _ in range(2400):
        if (tmp_path / "run" / "log.jsonl").is_file() or job.poll() is not None:
            break
        time.sleep(0.05)
    os.killpg(job.pid, signal.SIGTERM)
    status = job.wait(timeout=100)
    stage = json.loads((tmp_path / "run" / "stage.json").read_text())
    assert stage["status"] == "interrupted", (tmp_path / "said").read_text()[-3000:]
    assert status == 1 and checkpoints(tmp_path / "run")[-1].name == f"step_{stage['steps']}"
