"""Blocks run compiled while a stage trains, and as they were afterwards."""

import shutil

import pytest
import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from regiontower.train_stages.engine.compiling import compiled_blocks
from regiontower.vision_towers import UserError

CPU = torch.device("cpu")


class Block(GradientCheckpointingLayer):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.full((4,), 2.0))
        self.eager_calls = 0

    def forward(self, x):
        if not torch.compiler.is_compiling():
            self.eager_calls += 1
        return x * self.weight + 1


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(4, 1)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def compiled_and_eager(rank):
    model, x = Model(), torch.arange(12.0).reshape(3, 4)
    names, expected = list(model.state_dict()), model(x)
    before = [block.eager_calls for block in model.layers]
    with compiled_blocks(model, CPU) as blocks:
        assert blocks == list(model.layers)
        torch.testing.assert_close(model(x), expected)
        model(x[:2]).sum().backward()  # another size
        assert list(model.state_dict()) == names
    assert [block.eager_calls for block in model.layers] == before
    assert all(block.weight.grad is not None for block in model.layers)
    model(x)
    assert [block.eager_calls for block in model.layers] == [calls + 1 for calls in before]


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="no C++ compiler here")
def test_blocks_are_compiled_inside_and_eager_afterwards(in_processes):
    """In a process of its own: compiled gradients start threads, after which torch refuses to run in a fork."""
    in_processes(1, compiled_and_eager)


def test_off_means_off():
    model = Model()
    with compiled_blocks(model, CPU, enabled=False) as blocks:
        model(torch.ones(1, 4))
    assert not blocks and model.layers[0].eager_calls == 1


def test_without_a_compiler_it_is_one_sentence(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UserError, match=r"install g\+\+"), compiled_blocks(Model(), CPU):
        pass
