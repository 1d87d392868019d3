"""Streamed data in two gloo processes: each reads its part, they stop together, and go on with the same batches."""

import json
import signal

import pytest
import torch
from safetensors.torch import load_file
from small_runs import leave_group
from transformers import TrainerCallback

from regiontower.eval.probe import neighbours_during
from regiontower.train_stages.engine import StageInterrupted
from regiontower.train_stages.pretrain import pretrain
from regiontower.train_stages.pretrain_recipe import PretrainRecipe
from regiontower.train_stages.recipe import load_recipe
from regiontower.train_stages.record_io import read_records, write_records
from regiontower.train_stages.scenes import write_scenes
from regiontower.train_stages.streaming import StreamedItems

pytest.importorskip("datasets", reason="streaming needs datasets (pip install 'regiontower[stream]')")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """Records of 16 scenes, also as two files of eight each."""
    root = tmp_path_factory.mktemp("streamed")
    records = read_records(write_scenes(root, 16, seed=3, progress=False)).records
    for part in range(2):
        write_records(root / f"part{part}.jsonl", records[8 * part : 8 * part + 8])
    return root


class StopInStep4(TrainerCallback):
    """Between two checkpoints. Only the last process hears of it; both must stop, with another one."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 3 and args.process_index == args.world_size - 1:
            signal.raise_signal(signal.SIGTERM)


def train(rank, run_dir, root, stop=False):
    """The boxes of the images that this process decoded, in order."""
    leave_group()
    files = json.dumps([str(root / f"part{part}.jsonl") for part in range(2)])
    size = "{hidden_size: 32, layers: 1, heads: 1, intermediate_size: 64, image_size: 56, num_region_layers: 1}"
    overrides = [
        f"model.size={size}", "model.tower=null", "model.keep_heads=false", f"data.records={files}", "data.stream=true",
        "data.shuffle_buffer=4", "data.object_labels=category", "data.regions_per_image=4", "train.steps=6",
        "train.batch_size=3", "train.precision=fp32", "train.log_steps=1", "train.save_steps=2", "train.threads=1",
        f"eval.records={root}/records.jsonl", "eval.every=3", "eval.batch_size=5",
    ]  # fmt: skip
    recipe, decoded, item = load_recipe("rice-nano", PretrainRecipe, overrides), [], StreamedItems.item

    def noted(self, example):
        decoded.append([list(region.box_xyxy) for region in example[0].record.regions])
        return item(self, example)

    StreamedItems.item = noted  # of this forked process alone
    options = {"device": "cpu", "probe": neighbours_during("category")}
    if stop:
        with pytest.raises(StageInterrupted):
            pretrain(recipe, run_dir, callbacks=[StopInStep4()], **options)
    else:
        pretrain(recipe, run_dir, **options)
    return decoded


def test_two_processes_stream_their_parts_and_resume_to_the_bit(in_processes, tmp_path, scenes):
    straight = in_processes(2, train, tmp_path / "straight", scenes)
    before = in_processes(2, train, tmp_path / "resumed", scenes, True)
    after = in_processes(2, train, tmp_path / "resumed", scenes)
    files = [read_records(scenes / f"part{part}.jsonl").records for part in range(2)]
    parts = [{tuple(region.box_xyxy for region in record.regions) for record in records} for records in files]
    seen = [{tuple(map(tuple, boxes)) for boxes in of_process[:8]} for of_process in straight]
    assert seen in (parts, parts[::-1])  # a round of each is one of the files
    for rank in range(2):
        assert straight[rank][:9] == before[rank][:9]
        assert straight[rank][-len(after[rank]) :] == after[rank]  # nothing of what lies behind is decoded again
        assert 0 < len(after[rank]) < len(straight[rank])

    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("straight", "resumed"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    rows = [
        [json.loads(line) for line in (tmp_path / name / "eval.jsonl").read_text().splitlines()]
        for name in ("straight", "resumed")
    ]
    assert [row["step"] for row in rows[0]] == [3, 6]
    assert set(rows[0][0]["figures"]) == {"loss", "object_top1", "regions", "knn_top1"}
    assert [row["figures"] for row in rows[0]] == [row["figures"] for row in rows[1]]
