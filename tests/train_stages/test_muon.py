"""Muon in float32: torch's steps up to the rounding of bf16, torch's state, and an iteration that does what it says."""

import copy

import pytest
import torch
from torch import nn

from regiontower.train_stages.engine.muon import Float32Muon, orthogonalized

SETTINGS = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.9, "adjust_lr_fn": "match_rms_adamw"}
TORCHS = (3.4445, -4.775, 2.0315)  # coefficients of Jordan et al. 2024


@pytest.fixture
def weights():
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(rows, columns)) for rows, columns in ((6, 6), (4, 12), (12, 4), (3, 5))]


def steps(optimizer, weights, count=4, start=0):
    for step in range(start, start + count):
        torch.manual_seed(step)
        for weight in weights[:-1]:  # the last one has no gradient: it stays as it is
            weight.grad = torch.randn_like(weight)
        optimizer.step()


def twins(weights):
    return [nn.Parameter(weight.detach().clone()) for weight in weights]


def test_steps_are_torchs_up_to_the_rounding_of_bf16(weights):
    theirs, before = twins(weights), twins(weights)
    steps(Float32Muon(weights, **SETTINGS), weights)
    steps(torch.optim.Muon(theirs, **SETTINGS), theirs)
    for mine, other, first in zip(weights[:-1], theirs, before, strict=False):
        moved = (mine - first).norm()
        assert moved > 0.02 and (mine - other).norm() < 0.05 * moved
    assert torch.equal(weights[-1], before[-1])


def test_a_run_goes_on_from_torchs_state(weights):
    theirs = twins(weights)
    before = torch.optim.Muon(theirs, **SETTINGS)
    steps(before, theirs)
    stopped, ours = twins(theirs), twins(theirs)
    after = Float32Muon(ours, **SETTINGS)
    after.load_state_dict(copy.deepcopy(before.state_dict()))  # or both would write into the same averages
    steps(after, ours, 1, start=4)
    steps(before, theirs, 1, start=4)
    unaware = twins(stopped)
    steps(Float32Muon(unaware, **SETTINGS), unaware, 1, start=4)
    for mine, other, first, new in zip(ours[:-1], theirs, stopped, unaware, strict=False):
        assert (mine - other).norm() < 0.05 * (mine - first).norm() < (mine - new).norm()


@pytest.mark.parametrize("shape", [(8, 8), (5, 20), (20, 5)])
def test_only_the_singular_values_change(shape):
    torch.manual_seed(1)
    matrix = torch.randn(shape)
    u, _, vt = torch.linalg.svd(matrix, full_matrices=False)
    inside = u.T @ orthogonalized(matrix, TORCHS, 5, 1e-7) @ vt.T
    values = inside.diagonal()
    torch.testing.assert_close(inside, values.diag(), atol=1e-4, rtol=0)
    assert values.min() > 0.6 and values.max() < 1.3


def test_nothing_stays_nothing():
    assert not orthogonalized(torch.zeros(3, 4), TORCHS, 5, 1e-7).any()
