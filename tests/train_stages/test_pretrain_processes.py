"""Stage 0 in several gloo processes: what one process trains at the same global batch, with centres cut in pieces.

All ways: `python -m pytest -n 0 -m "slow or not slow" tests/train_stages/test_pretrain_processes.py`.
"""

import json
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from small_runs import leave_group
from transformers import CLIPVisionConfig, CLIPVisionModel, TrainerCallback

from regiontower.train_stages.engine import StageInterrupted
from regiontower.train_stages.pretrain import pretrain
from regiontower.train_stages.pretrain_recipe import PretrainRecipe
from regiontower.train_stages.recipe import load_recipe
from regiontower.train_stages.record_io import read_records
from regiontower.train_stages.scenes import write_scenes
from regiontower.train_stages.tokenizer import train_tokenizer
from regiontower.vision_towers.errors import UserError

GLOBAL_BATCH = 6
SMALL = [
    "model.tower=null",
    "model.keep_heads=false",
    "model.size={hidden_size: 32, layers: 2, heads: 2, intermediate_size: 64, patch_size: 14, image_size: 56, "
    "num_region_layers: 1}",
    "train.steps=4",
    "train.threads=1",
    "train.log_steps=1",
    "train.save_steps=2",
    "train.precision=fp32",
    "train.max_grad_norm=0.5",
    "data.regions_per_image=4",
    "data.object_labels=category",
]


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    return write_scenes(tmp_path_factory.mktemp("data") / "scenes", 24, seed=7, progress=False)


class StopInStep3(TrainerCallback):
    """Only the last of the processes hears of it; all must stop, with a checkpoint."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 2 and args.process_index == args.world_size - 1:
            signal.raise_signal(signal.SIGTERM)


def train(rank, processes, run_dir, records, overrides, stop=False, name="rice-nano"):
    values = [f"data.records={records}", f"data.cache_dir={records.parent}/pixels"]
    values += [f"eval.records={records}", "eval.every=2", "eval.batch_size=7"]  # no multiple of the processes
    values.append(f"train.batch_size={GLOBAL_BATCH // processes}")
    if processes > 1:
        leave_group()
    recipe = load_recipe(name, PretrainRecipe, [*SMALL, *values, *overrides])
    if not stop:
        pretrain(recipe, run_dir, device="cpu")
        return
    with pytest.raises(StageInterrupted):
        pretrain(recipe, run_dir, device="cpu", callbacks=[StopInStep3()])


def result(run_dir):
    losses = [json.loads(line)["loss"] for line in (run_dir / "log.jsonl").read_text().splitlines()]
    return losses, {
        f"{file.name} {key}": value for file in run_dir.glob("*.safetensors") for key, value in load_file(file).items()
    }


def held_out(run_dir):
    rows = [json.loads(line) for line in (run_dir / "eval.jsonl").read_text().splitlines()]
    return {row["step"]: row["figures"]["loss"] for row in rows}


def assert_equal(run_dir, losses, weights, atol):
    found_losses, found = result(run_dir)
    assert found_losses == pytest.approx(losses, abs=1e-4)
    assert found.keys() == weights.keys()
    for name, value in weights.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=atol, msg=lambda text, n=name: f"{n}: {text}")


SLOW = pytest.mark.slow
# (optimizer, processes that train from beginning to end, (processes before, processes after) of runs that are taken up)
WAYS = [
    pytest.param("sgd", 2, [(2, 3)], id="sgd-2-3"),
    pytest.param("adamw", 3, [(2, 1)], id="adamw-3-1"),
    pytest.param("sgd", 3, [(2, 1), (1, 2)], id="sgd-rest", marks=SLOW),
    pytest.param("adamw", 2, [(2, 3), (1, 2)], id="adamw-rest", marks=SLOW),
]


@pytest.mark.parametrize(("optimizer", "processes", "taken_up"), WAYS)
def test_processes_equal_one_and_take_each_other_up(in_processes, tmp_path, records, optimizer, processes, taken_up):
    overrides = [f"train.optimizer={optimizer}", "model.rice.loss.sample_rate=1.0"]
    train(0, 1, tmp_path / "one", records, overrides)
    losses, weights = result(tmp_path / "one")
    measured = held_out(tmp_path / "one")
    assert "centres.safetensors object" in weights and losses[-1] != losses[0] and set(measured) == {2, 4}
    # Adam divides by the size of a gradient: where that is near 0, rounding decides a whole step.
    atol = 1e-5 if optimizer == "sgd" else 2e-3

    in_processes(processes, train, processes, tmp_path / "all", records, overrides)
    assert_equal(tmp_path / "all", losses, weights, atol)
    assert held_out(tmp_path / "all") == pytest.approx(measured, abs=10 * atol)
    pieces = (tmp_path / "all" / "checkpoints" / "step_4" / "shards").glob("*.distcp")
    assert sorted(path.name[:4] for path in pieces) == [f"__{rank}_" for rank in range(processes)]
    for before, after in taken_up:
        run = tmp_path / f"{before}-{after}"
        for count, stop in ((before, True), (after, False)):
            if count == 1:
                train(0, 1, run, records, overrides, stop)
            else:
                in_processes(count, train, count, run, records, overrides, stop)
            stage = json.loads((run / "stage.json").read_text())
            assert (stage["status"], stage["steps"]) == (("interrupted", 3) if stop else ("finished", 4))
        assert_equal(run, losses, weights, atol)
        assert held_out(run) == pytest.approx(measured, abs=10 * atol)


def test_row_sparse_centres_come_back_from_a_checkpoint(in_processes, tmp_path, records):
    """The same processes before and after: equal to the bit, with the moments of the centres."""
    overrides = [
        "train.optimizer=adamw", "model.rice.row_sparse=true", "model.rice.loss.sample_rate=0.5", "lr.heads=0.05",
    ]  # fmt: skip
    for stop, name in ((False, "straight"), (True, "resumed"), (False, "resumed")):
        in_processes(2, train, 2, tmp_path / name, records, overrides, stop)
    losses, weights = result(tmp_path / "straight")
    assert_equal(tmp_path / "resumed", losses, weights, 0.0)


@pytest.mark.parametrize("objective", ["clip", "cloc", "umg-clip"])
def test_texts_are_contrasted_with_those_of_all_processes(in_processes, tmp_path, records, objective):
    captions = [caption for record in read_records(records).records for caption in record.captions]
    train_tokenizer(captions, tmp_path / "tokenizer", 512)
    where = {"clip": "clip", "cloc": "cloc.text", "umg-clip": "umg_clip.text"}[objective]
    overrides = [
        "train.optimizer=sgd", f"data.tokenizer={tmp_path}/tokenizer",
        f"model.{where}={{embed_dim: 16, text_hidden: 16, text_layers: 1, text_heads: 2}}",
    ]  # fmt: skip
    if objective == "umg-clip":  # of the tags some are drawn, and the same whatever the number of processes
        overrides.append("model.umg_clip.loss.tag_negatives=5")
    train(0, 1, tmp_path / "one", records, overrides, name=f"{objective}-nano")
    in_processes(2, train, 2, tmp_path / "two", records, overrides, False, f"{objective}-nano")
    assert_equal(tmp_path / "two", *result(tmp_path / "one"), 1e-5)
    assert held_out(tmp_path / "two") == pytest.approx(held_out(tmp_path / "one"), abs=1e-4)


def test_a_foreign_tower_may_have_parameters_that_no_region_needs(in_processes, tmp_path, records):
    """CLIP's last norm is behind what RoIAlign reads: without a word to DDP the second step would fail."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=56, patch_size=14)).save_pretrained(tmp_path / "clip")
    overrides = [f"model.tower={tmp_path}/clip", "train.optimizer=sgd", "train.steps=3"]
    in_processes(2, train, 2, tmp_path / "run", records, overrides)
    assert len(result(tmp_path / "run")[0]) == 3
    stage = json.loads((tmp_path / "run" / "stage.json").read_text())
    assert [name for name in stage["audit"]["no_gradient"] if "post_layernorm" in name]


def refused(rank, run_dir, records):
    with pytest.raises(UserError) as caught:
        train(rank, 2, run_dir, records, ["eval.batch_size=1"])
    return str(caught.value)


def test_a_held_out_batch_has_an_image_for_each_process(in_processes, tmp_path, records):
    for said in in_processes(2, refused, tmp_path / "run", records):
        assert said.startswith("2 processes cannot share a batch of 1 held-out images: raise eval.batch_size")


@SLOW  # three fresh interpreters; the processes of the other tests are set up as torchrun sets them up
def test_the_command_under_torchrun(tmp_path, records):
    values = [
        "train.steps=1",
        "train.batch_size=3",
        f"data.records={records}",
        f"data.cache_dir={records.parent}/pixels",
    ]
    sets = [word for value in [*SMALL, *values] for word in ("--set", value)]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = ["-m", "regiontower", "pretrain", "rice-nano", "--out", str(tmp_path / "run"), "--device", "cpu", *sets]
    done = subprocess.run([*launcher, *command], capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr[-2000:]
    stage = json.loads((tmp_path / "run" / "stage.json").read_text())
    assert (stage["status"], stage["machine"]["processes"]) == ("finished", 2)
    assert (tmp_path / "run" / "checkpoints" / "step_1" / "shards" / "__1_0.distcp").is_file()
