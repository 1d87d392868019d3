"""Symmetric InfoNCE against a twin that follows the formula pair by pair, alone and in several processes."""

import gc
import math

import pytest
import torch

from regiontower.train_stages.contrastive import MAX_LOGIT_SCALE, contrastive_loss
from regiontower.train_stages.gather import world

WIDTH, PAIRS = 5, 7
SPLITS = {2: [0, 4, 7], 3: [0, 3, 3, 7]}  # the second of three processes has no pair


def pairs():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, PAIRS, WIDTH, generator=generator, dtype=torch.float64)
    b[4], b[6] = 3.0 * b[1], b[2] + 0.01  # the same text in another length, and nearly the same
    return a, b, torch.tensor(math.log(7.0), dtype=torch.float64)


def twin(a, b, logit_scale, same_above):
    """By loops: the mean over pairs of both directions."""

    def cosine(x, y):
        return (x @ y) / (x.norm() * y.norm())

    scale, values = logit_scale.clamp(max=MAX_LOGIT_SCALE).exp(), []
    for i in range(len(a)):
        others = [j for j in range(len(a)) if j == i or same_above is None or cosine(b[i], b[j]) <= same_above]
        for x, ys in ((a[i], b), (b[i], a)):
            logits = torch.stack([scale * cosine(x, ys[j]) for j in others])
            values.append(logits.logsumexp(0) - logits[others.index(i)])
    return sum(values) / (2 * len(a))


def with_gradients(loss, tensors):
    return [loss.detach(), *torch.autograd.grad(loss, tensors)]


@pytest.mark.parametrize("same_above", [None, 0.9])
@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_equals_the_formula(same_above, chunk):
    inputs = [tensor.requires_grad_() for tensor in pairs()]
    found = contrastive_loss(*inputs, same_above=same_above, chunk=chunk)
    expected = with_gradients(twin(*inputs, same_above), inputs)
    for mine, theirs in zip(with_gradients(found.loss, inputs), expected, strict=True):
        torch.testing.assert_close(mine, theirs)
    assert found.correct.shape == (PAIRS,)


def test_the_same_text_is_no_negative_but_the_positive_stays():
    a, b, scale = pairs()
    plain, filtered = contrastive_loss(a, b, scale).loss, contrastive_loss(a, b, scale, same_above=0.9).loss
    assert filtered < plain
    everything = contrastive_loss(a, b, scale, same_above=-1.0)
    assert everything.loss == 0 and everything.correct.all()


def work(rank, processes, same_above):
    a, b, scale = pairs()
    mine = slice(SPLITS[processes][rank], SPLITS[processes][rank + 1])
    inputs = [tensor.requires_grad_() for tensor in (a[mine].clone(), b[mine].clone(), scale)]
    found = contrastive_loss(*inputs, same_above=same_above, group=world(), chunk=2)
    return *with_gradients(found.loss, inputs), found.correct


@pytest.mark.parametrize("processes", [2, 3])
@pytest.mark.parametrize("same_above", [None, 0.9])
def test_processes_equal_one(in_processes, processes, same_above):
    inputs = [tensor.requires_grad_() for tensor in pairs()]
    alone = contrastive_loss(*inputs, same_above=same_above)
    loss, of_a, of_b, of_scale = with_gradients(alone.loss, inputs)
    found = in_processes(processes, work, processes, same_above)
    # Data parallelism averages losses and gradients over processes.
    torch.testing.assert_close(sum(row[0] for row in found) / processes, loss)
    torch.testing.assert_close(torch.cat([row[1] for row in found]) / processes, of_a)
    torch.testing.assert_close(torch.cat([row[2] for row in found]) / processes, of_b)
    torch.testing.assert_close(sum(row[3] for row in found) / processes, of_scale)
    assert torch.equal(torch.cat([row[4] for row in found]), alone.correct)


def test_nothing_to_contrast_is_a_zero_that_has_a_gradient():
    a, b = torch.zeros(0, WIDTH, requires_grad=True), torch.zeros(0, WIDTH, requires_grad=True)
    out = contrastive_loss(a, b, torch.tensor(0.0))
    out.loss.backward()
    assert out.loss == 0 and a.grad.shape == (0, WIDTH)


@pytest.mark.parametrize("same_above", [None, 0.9])
def test_nothing_as_wide_as_the_batch_outlives_its_chunk(same_above):
    """Else memory would grow with the square of the batch: every chunk's rows of all columns."""
    width = 31  # pairs, a number that no other test has
    a, b = torch.randn(width, WIDTH, requires_grad=True), torch.randn(width, WIDTH, requires_grad=True)
    loss = contrastive_loss(a, b, torch.tensor(1.0), same_above=same_above, chunk=4).loss
    held = [thing.shape for thing in gc.get_objects() if type(thing) is torch.Tensor and thing.shape[-1:] == (width,)]
    assert not [shape for shape in held if len(shape) == 2]
    loss.backward()
    assert a.grad is not None and b.grad is not None


def test_the_temperature_is_bounded():
    a, b, _ = pairs()
    bound = contrastive_loss(a, b, torch.tensor(MAX_LOGIT_SCALE)).loss
    assert contrastive_loss(a, b, torch.tensor(50.0)).loss == bound
