"""Recipes of mixtures, and runs on them that are taken up again."""

import json
import os
import signal
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file
from small_mixtures import ALONE, COUNT, windows_of, write_sources
from transformers import TrainerCallback

from regiontower.train_stages.chat_stream import SizedChatStream as Stream
from regiontower.train_stages.chat_stream import packed, plain
from regiontower.train_stages.engine import StageInterrupted
from regiontower.train_stages.mixture import mixture_hash, open_mixture
from regiontower.train_stages.mixture_recipe import MixtureData
from regiontower.train_stages.mllm_stage import AlignRecipe, align
from regiontower.train_stages.recipe import load_recipe
from regiontower.train_stages.record_io import read_records
from regiontower.train_stages.webdataset import write_shards
from regiontower.vision_towers import UserError


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_sources(tmp_path_factory.mktemp("mixture"))


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
