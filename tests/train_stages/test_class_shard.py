"""Centres spread over two and three gloo processes: the loss and every gradient are those of one process."""

import pytest
import torch

from regiontower.train_stages.class_shard import ClassShard
from regiontower.train_stages.cluster_loss import ClusterLossConfig, cluster_discrimination_loss
from regiontower.vision_towers.errors import UserError

# Regions of each process; process 1 of three has none.
OF_PROCESS = {
    2: [[[4], [0, 7, 2], [10], [3, 5, 9, 1]], [[], [7, 10]]],
    3: [[[4], [0, 7, 2], [10]], [], [[3, 5, 9, 1], [], [7, 10]]],
}
SETS = [[4], [0, 7, 2], [10], [3, 5, 9, 1], [], [7, 10]]
SAMPLE = [1, 10, 4, 6, 0]
WIDTH = 5


def padded(sets):
    """Each process pads to its own longest set."""
    width = max(map(len, sets), default=0) or 1
    ids = torch.tensor([row + [-1] * (width - len(row)) for row in sets], dtype=torch.int64).reshape(-1, width)
    return ids, ids >= 0


def everything(classes):
    generator = torch.Generator().manual_seed(0)
    draw = {"dtype": torch.float64, "generator": generator}
    return torch.randn(len(SETS), WIDTH, **draw), torch.randn(classes, WIDTH, **draw)


def loss_and_gradients(embeds, centres, sets, config, form, sample, shard=None, row_sparse=False):
    embeds, centres = embeds.clone().requires_grad_(), centres.clone().requires_grad_()
    ids, valid = padded(sets)
    sample = None if sample is None else torch.tensor(sample)
    out = cluster_discrimination_loss(
        embeds, centres, ids, valid, config, form=form, shard=shard, sample=sample, row_sparse=row_sparse
    )
    out.loss.backward()
    assert centres.grad.is_sparse == row_sparse
    return out, embeds.grad, centres.grad.to_dense()


def work(rank, sets_of, classes, config, form, sample, row_sparse=False):
    embeds, centres = everything(classes)
    shard = ClassShard.mine(classes)
    first = sum(map(len, sets_of[:rank]))
    mine = slice(first, first + len(sets_of[rank]))
    held = centres[shard.first : shard.first + shard.size]
    out, *grads = loss_and_gradients(embeds[mine], held, sets_of[rank], config, form, sample, shard, row_sparse)
    return *grads, *(value.detach() for value in out)


@pytest.mark.parametrize("processes", [2, 3])
@pytest.mark.parametrize("form", ["decoupled", "mean_softmax"])
@pytest.mark.parametrize(
    ("sample", "margin_form", "row_sparse"),
    [(None, "cosface", False), (None, "arcface", False), (SAMPLE, "cosface", False), (SAMPLE, "arcface", True)],
)
def test_equals_one_process(in_processes, processes, form, sample, margin_form, row_sparse):
    """All classes as negatives (rho = 1), or the same five of eleven for any number of processes (rho < 1)."""
    config = ClusterLossConfig(9.0, 0.3, margin_form, sample_rate=1.0 if sample is None else len(SAMPLE) / 11)
    out, of_embeds, of_centres = loss_and_gradients(*everything(11), SETS, config, form, sample)
    found = in_processes(processes, work, OF_PROCESS[processes], 11, config, form, sample, row_sparse)
    # Data parallelism averages over processes, so each holds the gradient times their number.
    torch.testing.assert_close(torch.cat([row[0] for row in found]) / processes, of_embeds)
    torch.testing.assert_close(torch.cat([row[1] for row in found]), of_centres)
    for row in found:  # every process knows the whole result
        for got, expected in zip(row[2:], out, strict=True):
            torch.testing.assert_close(got, expected.detach())


def test_a_process_without_classes(in_processes):
    """Four classes in three processes: two, two and none."""
    config, sets = ClusterLossConfig(9.0, sample_rate=1.0), [[[1], [2, 3]], [[0]], [[3], [1], [2]]]
    together = [row for rows in sets for row in rows]
    out, of_embeds, of_centres = loss_and_gradients(*everything(4), together, config, "decoupled", None)
    found = in_processes(3, work, sets, 4, config, "decoupled", None)
    assert [len(row[1]) for row in found] == [2, 2, 0]
    torch.testing.assert_close(torch.cat([row[0] for row in found]) / 3, of_embeds)
    torch.testing.assert_close(torch.cat([row[1] for row in found]), of_centres)
    assert all(row[2] == out.loss for row in found)


def sampled_columns(rank):
    """How many centres get a gradient from the negatives of one region without positives there."""
    shard = ClassShard.mine(40)
    centres = torch.randn(shard.size, WIDTH, requires_grad=True)
    embeds = torch.randn(1, WIDTH, generator=torch.Generator().manual_seed(1))
    config = ClusterLossConfig(sample_rate=0.25)
    ids = torch.tensor([[-1]]) if rank else torch.tensor([[0]])
    cluster_discrimination_loss(embeds, centres, ids, ids >= 0, config, shard=shard).loss.backward()
    return int((centres.grad != 0).any(dim=1).sum())


def test_each_process_draws_of_its_own_classes(in_processes):
    counts = in_processes(2, sampled_columns)
    assert counts[1] == 5  # floor(20 * 0.25)
    assert counts[0] in (5, 6)  # the positive is a negative to nobody, but gets its own pull


def test_a_wrong_table_is_one_sentence():
    embeds, ids = torch.randn(1, WIDTH), torch.tensor([[0]])
    with pytest.raises(UserError, match="holds 4 of 9 classes, and got a table of 3"):
        cluster_discrimination_loss(
            embeds, torch.randn(3, WIDTH), ids, ids >= 0, ClusterLossConfig(), shard=ClassShard(9, 0, 4)
        )
