"""Muon beside AdamW: which tensors go where, the same steps as the two alone, and a state that comes back."""

import copy
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from regiontower.train_stages.engine import Part, row_adamw
from regiontower.train_stages.engine.muon import Float32Muon
from regiontower.train_stages.engine.optimizers import JointOptimizer, build_optimizer
from regiontower.train_stages.engine.parts import parameter_groups
from regiontower.train_stages.engine.trainer import StageTrainer
from regiontower.train_stages.train_config import TrainConfig
from regiontower.vision_towers.errors import UserError

TRAIN = TrainConfig(steps=3, optimizer="muon", weight_decay=0.1, betas=(0.9, 0.98))


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(10, 8)
        self.hidden = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        self.patches = nn.Conv2d(3, 8, 2)
        self.centres = nn.Parameter(torch.randn(5, 8))
        self.lm_head = nn.Linear(8, 10, bias=False)

    def forward(self):
        x = self.hidden(self.table.weight) @ self.centres.T
        return x.square().mean() + self.lm_head(self.centres).square().mean() + self.patches.weight.square().mean()


def groups(model, muon_lr=2.0):
    return parameter_groups(model, [Part("all", ("",), 0.01)], 0.1, muon_lr=muon_lr)


def steps(model, optimizer, count=3):
    for _ in range(count):
        optimizer.zero_grad()
        model().backward()
        optimizer.step()
    return {name: tensor.detach().clone() for name, tensor in model.named_parameters()}


def test_muon_takes_hidden_matrices_alone():
    model = Tiny()
    found = {
        name
        for name, p in model.named_parameters()
        for g in groups(model)
        if g["method"] == "muon" and p is g["params"][0]
    }
    assert found == {"hidden.0.weight"}  # the first of its group; the other one:
    (hidden,) = (group for group in groups(model) if group["method"] == "muon")
    assert [id(p) for p in hidden["params"]] == [id(model.hidden[0].weight), id(model.hidden[2].weight)]
    assert hidden["lr"] == pytest.approx(0.02) and all(g["lr"] == 0.01 for g in groups(model) if g["method"] != "muon")
    assert not any(group["method"] == "muon" for group in parameter_groups(model, [Part("all", ("",), 0.01)], 0.1))


def test_a_tied_head_is_a_table():
    model = Tiny()
    model.lm_head.weight = model.table.weight
    assert sum(len(group["params"]) for group in groups(model) if group["method"] == "muon") == 2


def test_steps_are_those_of_the_two_optimizers():
    ours, theirs = Tiny(), Tiny()
    found = steps(ours, build_optimizer(groups(ours), TRAIN, "cpu"))

    matrices = [theirs.hidden[0].weight, theirs.hidden[2].weight]
    chosen = {id(matrix) for matrix in matrices}
    decayed = [theirs.patches.weight, theirs.centres, theirs.lm_head.weight]
    bare = [p for p in theirs.parameters() if id(p) not in chosen | {id(d) for d in decayed}]
    muon = Float32Muon(matrices, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": bare, "weight_decay": 0.0}], lr=0.01, betas=(0.9, 0.98)
    )
    for _ in range(3):
        theirs.zero_grad()
        theirs().backward()
        muon.step()
        adamw.step()
    for name, tensor in theirs.named_parameters():
        torch.testing.assert_close(found[name], tensor.detach(), msg=name)


def test_the_state_comes_back_and_a_scheduler_reaches_both():
    model = Tiny()
    optimizer = build_optimizer(groups(model), TRAIN, "cpu")
    steps(model, optimizer, 2)
    saved, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model.state_dict())
    straight = steps(model, optimizer, 2)

    again = Tiny()
    again.load_state_dict(weights)
    restored = build_optimizer(groups(again), TRAIN, "cpu")
    restored.load_state_dict(saved)
    for name, tensor in steps(again, restored, 2).items():
        assert torch.equal(tensor, straight[name]), name

    torch.optim.lr_scheduler.LambdaLR(restored, lambda step: 0.0)  # sets the rate of its first step at once
    before = {name: tensor.detach().clone() for name, tensor in again.named_parameters()}
    for name, tensor in steps(again, restored, 1).items():
        assert torch.equal(tensor, before[name]), name
    assert isinstance(restored, JointOptimizer)


def test_muon_is_refused_for_matrices_in_shards(in_processes):
    whole = Tiny()
    sentence = r"train\.optimizer is muon, which works on whole matrices, .* launch with ddp"
    with pytest.raises(UserError, match=sentence):  # accelerate cuts them once there is an optimizer
        build_optimizer(groups(whole), TRAIN, "cpu", cut_later=True)
    whole.hidden[0].weight.ds_id = 0  # how DeepSpeed marks what ZeRO-3 has cut
    with pytest.raises(UserError, match=sentence):
        build_optimizer(groups(whole), TRAIN, "cpu")
    build_optimizer(groups(whole, muon_lr=None), TrainConfig(steps=3), "cpu")
    (said,) = in_processes(1, of_fsdp2)
    assert re.search(sentence, said)


def of_fsdp2(rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = Tiny()
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    try:
        build_optimizer(groups(model), TRAIN, "cpu")
    except UserError as error:
        return str(error)


@pytest.mark.parametrize("engine", ["is_fsdp_enabled", "is_deepspeed_enabled"])
def test_a_trainer_that_will_cut_its_model_makes_no_muon(engine):
    trainer = SimpleNamespace(
        optimizer=None,
        bare_model=Tiny,
        _parts=[Part("all", ("",), 0.01)],
        _train=TRAIN,
        args=SimpleNamespace(device=torch.device("cpu")),
        **{"is_fsdp_enabled": False, "is_deepspeed_enabled": False, engine: True},
    )
    with pytest.raises(UserError, match=r"train\.optimizer is muon"):
        StageTrainer.create_optimizer(trainer)


class Classes(nn.Module):
    """A map, and a table of which each step sees a few rows."""

    row_sparse = frozenset({"centres"})

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.map = nn.Linear(4, 4)
        self.centres = nn.Parameter(torch.randn(9, 4))

    def forward(self):
        rows = nn.functional.embedding(torch.tensor([1, 5, 5]), self.centres, sparse=True)
        return self.map(rows).square().sum()


def test_drawn_rows_move_alone_and_as_under_adamw(monkeypatch):
    monkeypatch.setattr(row_adamw, "ROWS", 1)  # more than one part
    ours, theirs = Classes(), Classes()
    before = ours.centres.detach().clone()
    optimizer = build_optimizer(parameter_groups(ours, [Part("all", ("",), 0.01)], 0.1), TRAIN, "cpu")
    found = steps(ours, optimizer)["centres"]
    adamw = torch.optim.AdamW(
        [
            {"params": [theirs.centres, theirs.map.weight], "weight_decay": 0.1},
            {"params": [theirs.map.bias], "weight_decay": 0.0},
        ],
        lr=0.01,
        betas=(0.9, 0.98),
    )
    for _ in range(3):
        theirs.zero_grad()
        theirs().backward()
        theirs.centres.grad = theirs.centres.grad.to_dense()
        adamw.step()
    torch.testing.assert_close(found[[1, 5]], theirs.centres.detach()[[1, 5]])
    untouched = [row for row in range(9) if row not in (1, 5)]
    assert torch.equal(found[untouched], before[untouched]) and not torch.equal(found[[1, 5]], before[[1, 5]])


def test_drawn_rows_move_alone_under_sgd():
    model = Classes()
    before = model.centres.detach().clone()
    train = replace(TRAIN, optimizer="sgd")
    found = steps(model, build_optimizer(parameter_groups(model, [Part("all", ("",), 0.01)], 0.1), train, "cpu"))
    assert (found["centres"] != before).any(dim=1).nonzero()[:, 0].tolist() == [1, 5]
