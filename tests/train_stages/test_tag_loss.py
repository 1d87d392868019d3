"""The tags' sigmoid against a twin that goes label by label, alone and in several processes."""

import math

import pytest
import torch

from regiontower.train_stages.gather import world
from regiontower.train_stages.tag_loss import sampled_tags, tag_loss, tags_in_sample

BANK, WIDTH = 30, 5
TAGS = torch.tensor([[4, 9, -1], [-1, -1, -1], [9, -1, -1], [20, 4, 1], [-1, 7, -1]])
SPLITS = {2: [0, 2, 5], 3: [0, 3, 3, 5]}  # the second of three processes has no row


def inputs():
    generator = torch.Generator().manual_seed(0)
    embeds = torch.randn(len(TAGS), WIDTH, generator=generator, dtype=torch.float64)
    bank = torch.randn(BANK, WIDTH, generator=generator, dtype=torch.float64)
    return embeds, bank, torch.tensor(math.log(6.0)).double(), torch.tensor(-3.0).double()


def twin(embeds, bank, log_scale, bias, sample):
    """By loops: for every row with tags, the sum over the sampled tags of -log of its label's probability."""
    values = []
    for row, own in zip(embeds, TAGS.tolist(), strict=True):
        if all(tag < 0 for tag in own):
            continue
        for tag in sample.tolist():
            cosine = (row @ bank[tag]) / (row.norm() * bank[tag].norm())
            probability = 1 / (1 + torch.exp(-(log_scale.exp() * cosine + bias)))
            values.append(-torch.log(probability if tag in own else 1 - probability))
    return sum(values) / 4  # rows with tags


def work(rank, processes, negatives):
    """This process's loss, sample, correct rows, and the gradients of its inputs; seeds differ, the first counts."""
    embeds, bank, scale, bias = (tensor.requires_grad_() for tensor in inputs())
    mine = slice(*SPLITS[processes][rank : rank + 2]) if processes > 1 else slice(None)
    group = world() if processes > 1 else None
    sample = sampled_tags(TAGS[mine], BANK, negatives, torch.tensor(5 + rank), group)
    own = tags_in_sample(TAGS[mine], sample, BANK)
    out = tag_loss(embeds[mine], bank[sample], own, scale, bias, group)
    return out.loss.detach(), sample, out.correct, torch.autograd.grad(out.loss, (embeds, bank, scale, bias))


@pytest.mark.parametrize("negatives", [0, 7, 100])
def test_equals_the_formula(negatives):
    loss, sample, _, gradients = work(0, 1, negatives)
    assert len(sample) == min(BANK, 5 + negatives) and {1, 4, 7, 9, 20} <= set(sample.tolist())
    assert sample.tolist() == sorted(set(sample.tolist()))
    tensors = [tensor.requires_grad_() for tensor in inputs()]
    expected = twin(*tensors, sample)
    torch.testing.assert_close(loss, expected.detach())
    for mine, theirs in zip(gradients, torch.autograd.grad(expected, tensors), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_equal_one(in_processes, processes):
    loss, sample, correct, gradients = work(0, 1, 7)
    found = in_processes(processes, work, processes, 7)
    assert all(torch.equal(row[1], sample) for row in found)
    # Data parallelism averages losses and gradients over processes.
    torch.testing.assert_close(sum(row[0] for row in found) / processes, loss)
    assert torch.equal(torch.cat([row[2] for row in found]), correct)
    for number, expected in enumerate(gradients):
        torch.testing.assert_close(sum(row[3][number] for row in found) / processes, expected)


def test_the_draw_is_uniform_over_absent_tags_and_follows_its_seed():
    def draw(seed):
        return sampled_tags(TAGS, BANK, 5, torch.tensor(seed)).tolist()

    assert draw(3) == draw(3)
    counts = torch.bincount(torch.tensor([tag for seed in range(2000) for tag in draw(seed)]), minlength=BANK)
    present = [1, 4, 7, 9, 20]
    assert (counts[present] == 2000).all()
    others = counts[[tag for tag in range(BANK) if tag not in present]]
    assert (others - 400).abs().max() < 5 * math.sqrt(400)  # 5 of 25 at each draw


def test_nearest_tags():
    embeds = torch.eye(3)
    own = torch.tensor([[True, False, False], [True, False, True], [False, False, False]])
    correct = tag_loss(embeds, torch.eye(3), own, torch.tensor(0.0), torch.tensor(0.0)).correct
    assert correct.tolist() == [True, False]  # the third has no tags


@pytest.mark.parametrize(("rows", "bank"), [(0, 4), (3, 0)])
def test_nothing_to_tell_apart_is_a_zero_that_has_a_gradient(rows, bank):
    embeds, texts = torch.randn(rows, WIDTH, requires_grad=True), torch.randn(bank, WIDTH, requires_grad=True)
    scale, bias = torch.tensor(0.0, requires_grad=True), torch.tensor(0.0, requires_grad=True)
    out = tag_loss(embeds, texts, torch.zeros(rows, bank, dtype=torch.bool), scale, bias)
    out.loss.backward()
    assert out.loss == 0 and len(out.correct) == 0
    assert all(tensor.grad is not None and not tensor.grad.any() for tensor in (embeds, texts, scale, bias))
