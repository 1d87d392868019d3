"""A mixture on two processes: the samples of one process, the losses of one process, whatever is in a batch."""

import json

import pytest

from regiontower.train_stages.mllm_stage import AlignRecipe, align
from regiontower.train_stages.recipe import load_recipe
from regiontower.train_stages.scenes import write_scenes

STEPS = 6


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Scenes, and as many conversations without a picture."""
    folder = tmp_path_factory.mktemp("processes")
    write_scenes(folder, 10, 0, preset="easy", progress=False)
    talks = [
        [{"from": "human", "value": f"Say {number}."}, {"from": "gpt", "value": str(number) * (1 + number % 3)}]
        for number in range(10)
    ]
    (folder / "talks.jsonl").write_text("\n".join(json.dumps({"conversations": talk}) for talk in talks))
    return folder


def run(rank, root, parents, out, batch_size, data):
    records = {"records": str(root / "records.jsonl"), "mix": {"classify": 1, "grounding": 1}, "turns": 2}
    recipe = {
        "model": {"tower": str(parents / "tower"), "language_model": str(parents / "lm")},
        "data": {"sources": [records, {"records": str(root / "talks.jsonl"), "format": "conversations"}], **data},
        "lr": {"projector": 0.1, "region_projector": 0.1},
        "train": {"steps": STEPS, "batch_size": batch_size, "threads": 1, "log_steps": 1, "optimizer": "sgd"},
    }
    align(load_recipe(recipe, AlignRecipe), out, device="cpu")


def losses(out):
    return [json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "data",
    [
        {"batches": "grouped", "window": 12},
        {"batches": "packed", "row_tokens": 300, "max_tokens": 300, "window": 12, "feature_cache": "fp32"},
    ],
    ids=["grouped", "packed"],
)
def test_two_processes_have_the_losses_of_one(in_processes, root, tiny_parents, tmp_path, data):
    """Batches without a picture come between those with one: no process waits for the other."""
    in_processes(2, run, root, tiny_parents, tmp_path / "two", 2, data)
    in_processes(1, run, root, tiny_parents, tmp_path / "one", 4, data)
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(one) == len(two) == STEPS and len(set(one)) == STEPS
    assert two == pytest.approx(one, rel=1e-4)
