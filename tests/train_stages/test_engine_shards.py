"""Tables cut over processes: their own clipping, and checkpoints that any number of processes takes up."""

import json

import pytest
import torch
from small_runs import small_run
from torch import nn
from transformers import TrainerCallback

from regiontower.train_stages.class_shard import ClassShard
from regiontower.train_stages.engine import Part
from regiontower.train_stages.engine.audit import PATIENCE
from regiontower.train_stages.engine.parts import parameter_groups
from regiontower.train_stages.engine.row_adamw import RowAdamW
from regiontower.train_stages.engine.shards import (
    _place_of_numbers,
    clip_shards,
    load_shards,
    save_shards,
    whole_table,
)

CLASSES, WIDTH, STEPS, MAX_NORM = 7, 3, 4, 0.5
OPTIMIZERS = {"adamw": torch.optim.AdamW, "row_adamw": RowAdamW}


class Table(nn.Module):
    """This process's rows of a table, and a parameter that all have."""

    def __init__(self, classes=CLASSES):
        super().__init__()
        shard = ClassShard.mine(classes)
        self.class_shards = {"centres": shard}
        whole = torch.randn(classes, WIDTH, generator=torch.Generator().manual_seed(0))
        self.centres = nn.Parameter(whole[shard.first : shard.first + shard.size].clone())
        self.shared = nn.Parameter(torch.ones(WIDTH))


def gradient_of(step, shard, sparse):
    """Of five rows of the table, one of them twice; this process's part."""
    generator = torch.Generator().manual_seed(step)
    classes, values = torch.randint(CLASSES, (5,), generator=generator), torch.randn(5, WIDTH, generator=generator)
    classes[-1] = classes[0]
    rows, here = shard.local(classes)
    found = torch.sparse_coo_tensor(rows[here][None], values[here], (shard.size, WIDTH))
    return found if sparse else found.to_dense()


def work(rank, optimizer, folder, first, last):
    """Steps `first` to `last`, from a checkpoint and into one; the table, and each step's norm after clipping."""
    model = Table()
    shard = model.class_shards["centres"]
    made = OPTIMIZERS[optimizer]([model.centres], lr=0.1)
    if first:
        load_shards(folder / str(first), model, made)
    norms = []
    for step in range(first, last):
        model.centres.grad = gradient_of(step, shard, optimizer == "row_adamw")
        model.shared.grad = torch.full((WIDTH,), 1e6)  # of no weight here
        clip_shards(model, MAX_NORM)
        assert (model.shared.grad == 1e6).all()
        whole = whole_table(model.centres.grad.to_dense(), shard)
        norms.append(float(whole.norm()))
        made.step()
    save_shards(folder / str(last), model, made)
    return whole_table(model.centres, shard), torch.tensor(norms)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_other_numbers_of_processes_go_on_with_weights_and_moments(in_processes, tmp_path, optimizer):
    (tmp_path / "one").mkdir()
    wanted, norms = work(0, optimizer, tmp_path / "one", 0, STEPS)
    torch.testing.assert_close(norms, torch.full((STEPS,), MAX_NORM))  # each was larger
    for before, after in ((2, 3), (3, 1), (1, 2)):
        folder = tmp_path / f"{before}-{after}"
        folder.mkdir()
        for count, first, last in ((before, 0, 2), (after, 2, STEPS)):
            arguments = (optimizer, folder, first, last)
            found = [work(0, *arguments)] if count == 1 else in_processes(count, work, *arguments)
        for table, seen in found:
            torch.testing.assert_close(table, wanted)
            torch.testing.assert_close(seen, norms[2:])


class Classifier(Table):
    """That table as the last layer of a model that the engine trains."""

    def forward(self, x):
        return {"loss": ((x[:, :WIDTH] * self.shared) @ self.centres.T).square().sum() / len(x)}


@pytest.mark.parametrize("max_grad_norm", [1e-3, 0.0])
def test_a_run_clips_the_table_apart_from_the_rest(tmp_path, max_grad_norm):
    """Each to the norm of the recipe; with 0 nothing is clipped."""
    norms = []

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            norms.append([float(model.get_parameter(name).grad.norm()) for name in ("centres", "shared")])

    model = Classifier()
    options = {"model": model, "parts": [Part("all", ("",), 1e-3)], "save": lambda folder: None}
    small_run(tmp_path / "run", callbacks=[Watch()], options=options, steps=3, max_grad_norm=max_grad_norm)
    assert len(norms) == 3
    for each in norms:
        if max_grad_norm:
            assert each == pytest.approx([max_grad_norm] * 2, rel=0.01)
        else:
            assert min(each) > 0.1


def test_a_small_gradient_is_left_alone():
    model = Table()
    model.centres.grad = torch.full((CLASSES, WIDTH), 1e-3)
    clip_shards(model, MAX_NORM)
    assert (model.centres.grad == 1e-3).all()


def run_with_one_class(rank, run_dir):
    """More steps than a part may go without gradients; this process's rows, and its parameter groups."""
    model = Classifier(classes=1)
    parts = [Part("table", ("centres",), 1e-2), Part("rest", ("shared",), 1e-2)]
    small_run(run_dir, options={"model": model, "parts": parts, "save": lambda folder: None}, steps=PATIENCE + 2)
    return len(model.centres), [(each["part"], each["weight_decay"]) for each in parameter_groups(model, parts, 0.1)]


def test_a_process_without_classes_trains_with_the_others(in_processes, tmp_path):
    (one, groups), (none, theirs) = in_processes(2, run_with_one_class, tmp_path / "run")
    assert (one, none) == (1, 0)
    assert groups == theirs == [("table", 0.1), ("rest", 0.0)]  # by the shape of its rows it would be a vector
    stage = json.loads((tmp_path / "run" / "stage.json").read_text())
    assert stage["status"] == "finished" and stage["audit"]["moved"] == {"table": 1, "rest": 1}


def test_the_count_of_steps_lies_where_a_fused_optimizer_wants_it():
    elsewhere = nn.Parameter(torch.ones(2, 3, device="meta"))  # stands for a GPU
    for settings, place in (({"fused": True}, "meta"), ({"capturable": True}, "meta"), ({}, "cpu")):
        optimizer = torch.optim.AdamW([nn.Parameter(torch.ones(1)), elsewhere], lr=0.1)
        optimizer.param_groups[0] |= settings
        assert _place_of_numbers(optimizer, elsewhere) == torch.device(place)
