"""The cluster discrimination loss against slow twins that follow the equations region by region, in float64."""

import math
from dataclasses import replace

import pytest
import torch

from regiontower.train_stages.cluster_loss import (
    ClusterLossConfig,
    cluster_discrimination_loss,
    exp_sum,
    log_one_plus,
    pick_positives,
    sample_classes,
)
from regiontower.vision_towers.errors import UserError

PAD = -1
SETS = [[4], [0, 7, 2], [11], [3, 5, 9, 1, 8, 6], [], [7, 10]]  # an empty set and one longer than max_positives=4


def padded(sets):
    width = max(map(len, sets))
    ids = torch.tensor([row + [PAD] * (width - len(row)) for row in sets])
    return ids, ids != PAD


def case(num_classes=12, dim=6, sets=SETS, spread=1.0, dtype=torch.float64):
    torch.manual_seed(0)
    embeds = (torch.randn(len(sets), dim, dtype=dtype) * spread).requires_grad_()
    centres = torch.randn(num_classes, dim, dtype=dtype).requires_grad_()
    return embeds, centres, *padded(sets)


def cosine(a, b):
    return (a / a.norm()) @ (b / b.norm())


def twin(embeds, centres, sets, config, form, seed):
    """The mean loss by loops, following the text: which classes are drawn is replayed from the same seed."""
    generator = torch.Generator().manual_seed(seed)
    num_classes, rho = len(centres), config.sample_rate

    def draw():
        if rho == 1.0:
            return list(range(num_classes))
        return torch.randperm(num_classes, generator=generator)[: max(1, math.floor(num_classes * rho + 1e-9))].tolist()

    def s_positive(v, c):
        cos = cosine(v, centres[c])
        value = cos - config.margin if config.margin_form == "cosface" else torch.cos(torch.acos(cos) + config.margin)
        return config.scale * value

    def s_negative(v, c):
        return config.scale * cosine(v, centres[c])

    ids, valid = padded(sets)
    ids, valid = pick_positives(ids.masked_fill(~valid, 0), valid, config.max_positives, generator)
    picked = [row[mask].tolist() for row, mask in zip(ids, valid, strict=True)]
    slots = ids.shape[1] if form == "mean_softmax" else 1
    samples = [draw() for _ in range(slots)]

    values = []
    for v, chosen, row, own in zip(embeds, picked, valid, sets, strict=True):
        if not own:
            continue
        assert set(chosen) <= set(own)
        assert len(chosen) == min(len(own), config.max_positives)
        if form == "decoupled":
            positive = sum(torch.exp(-s_positive(v, c)) for c in chosen)
            negative = sum((torch.exp(s_negative(v, c)) for c in samples[0] if c not in own), torch.tensor(0.0))
            values.append(torch.log(1 + positive) + torch.log(1 + negative))
        else:
            terms = []
            for c, slot in zip(chosen, row.nonzero().flatten().tolist(), strict=True):
                top = torch.exp(s_positive(v, c))
                others = sum((torch.exp(s_negative(v, n)) for n in samples[slot] if n not in own), torch.tensor(0.0))
                terms.append(-torch.log(top / (top + others)))
            values.append(sum(terms) / len(terms))
    return sum(values) / len(values)


@pytest.mark.parametrize("form", ["decoupled", "mean_softmax"])
@pytest.mark.parametrize("margin_form", ["cosface", "arcface"])
@pytest.mark.parametrize("rho", [1.0, 0.5])
@pytest.mark.parametrize("scale", [3.0, 64.0])
@pytest.mark.parametrize("max_positives", [1, 4, 10])
def test_equals_the_loop_twin(form, margin_form, rho, scale, max_positives):
    config = ClusterLossConfig(scale, 0.3, margin_form, sample_rate=rho, max_positives=max_positives)
    embeds, centres, ids, valid = case()
    generator = torch.Generator().manual_seed(5)
    out = cluster_discrimination_loss(embeds, centres, ids, valid, config, form=form, generator=generator)
    expected = twin(embeds, centres, SETS, config, form, seed=5)
    assert out.loss.item() == pytest.approx(expected.item(), rel=1e-12)
    got = torch.autograd.grad(out.loss, (embeds, centres))
    want = torch.autograd.grad(expected, (embeds, centres))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("form", ["decoupled", "mean_softmax"])
@pytest.mark.parametrize("margin_form", ["cosface", "arcface"])
def test_gradcheck(form, margin_form):
    config = ClusterLossConfig(scale=8.0, margin_form=margin_form, sample_rate=0.6, max_positives=3)
    embeds, centres, ids, valid = case()

    def value(embeds, centres):
        generator = torch.Generator().manual_seed(1)
        return cluster_discrimination_loss(embeds, centres, ids, valid, config, form=form, generator=generator).loss

    assert torch.autograd.gradcheck(value, (embeds, centres))


def test_objects_are_the_one_positive_case():
    """Equation 3 is equation 4 with one positive; with one positive the two forms share their gradient's direction."""
    embeds, centres, ids, valid = case(sets=[[4], [0], [11]])
    config = ClusterLossConfig(sample_rate=1.0)
    out = cluster_discrimination_loss(embeds, centres, ids, valid, config)
    v, w = torch.nn.functional.normalize(embeds, dim=1), torch.nn.functional.normalize(centres, dim=1)
    s = 64.0 * v @ w.T
    rows = torch.arange(3)
    positive = s[rows, ids[:, 0]] - 64.0 * 0.3
    negative = s.masked_fill(torch.nn.functional.one_hot(ids[:, 0], 12).bool(), -torch.inf)
    expected = torch.log1p(torch.exp(-positive)) + torch.log1p(torch.exp(negative).sum(1))
    torch.testing.assert_close(out.per_region, expected)


def test_stated_gradient_of_the_logits():
    """d/ds_j = e^{s_j} / (1 + sum e^s)."""
    logits = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    log_one_plus(exp_sum(logits, torch.ones(3, 5, dtype=torch.bool))).sum().backward()
    expected = logits.exp() / (1 + logits.exp().sum(1, keepdim=True))
    torch.testing.assert_close(logits.grad, expected.detach())


def test_sums_of_shards_combine():
    """Two halves of the classes, reduced as two processes would, give the whole."""
    logits = torch.randn(4, 10, dtype=torch.float64) * 40
    keep = torch.rand(4, 10) > 0.2
    keep[0, :5] = False  # a shard where one row has nothing
    left, right = exp_sum(logits[:, :5], keep[:, :5]), exp_sum(logits[:, 5:], keep[:, 5:])
    top = torch.maximum(left.top, right.top)
    total = sum(part.total * torch.exp(part.top - top) for part in (left, right))
    torch.testing.assert_close(log_one_plus(type(left)(top, total)), log_one_plus(exp_sum(logits, keep)))


@pytest.mark.parametrize("size", [0.0, 1e-9, 30.0, 700.0])
def test_float32_is_accurate_at_every_magnitude(size):
    logits = torch.full((1, 3), -math.log(1e9) if size == 1e-9 else size)
    keep = torch.tensor([[True, True, size != 0.0]])
    exact = torch.logsumexp(torch.cat([torch.zeros(1, 1), logits.masked_fill(~keep, -torch.inf)], 1).double(), 1)
    torch.testing.assert_close(log_one_plus(exp_sum(logits, keep)).double(), exact, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize(("positive", "negative"), [(-0.1, -0.3), (0.0, -0.2), (0.9, -0.9), (-1.0, -1.0), (-0.9, 0.9)])
def test_the_softmax_form_is_accurate_in_float32_at_every_cosine(positive, negative):
    """Far from any class, as at the start of training; s = 64 and one negative: log(1 + exp(s_j - s_i))."""
    v = torch.tensor([[1.0, 0.0]], requires_grad=True)
    centres = torch.tensor([[cos, math.sqrt(1 - cos**2)] for cos in (positive, negative)], requires_grad=True)
    ids, config = torch.tensor([[0]]), ClusterLossConfig(sample_rate=1.0)
    out = cluster_discrimination_loss(v, centres, ids, ids == 0, config, form="mean_softmax")
    exact = torch.nn.functional.softplus(torch.tensor(64.0 * (negative - positive + 0.3), dtype=torch.float64))
    torch.testing.assert_close(out.loss.double(), exact, rtol=1e-5, atol=1e-12)
    out.loss.backward()
    assert v.grad.isfinite().all() and centres.grad.isfinite().all()


@pytest.mark.parametrize("form", ["decoupled", "mean_softmax"])
def test_a_region_whose_negatives_are_all_its_own_classes(form):
    """Nothing is drawn against it: in the softmax form it has no loss, and nothing is infinite."""
    v, centres = torch.randn(2, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    ids, sample = torch.tensor([[0, 1], [2, 2]]), torch.tensor([0, 1])
    valid = torch.tensor([[True, True], [True, False]])
    config = ClusterLossConfig(sample_rate=0.7)
    out = cluster_discrimination_loss(v, centres, ids, valid, config, form=form, sample=sample)
    assert (out.per_region[0] == 0) == (form == "mean_softmax") and out.per_region.isfinite().all()
    out.loss.backward()
    assert v.grad.isfinite().all() and centres.grad.isfinite().all()


def test_sample_size_is_exact_and_uniform():
    generator = torch.Generator().manual_seed(0)
    for classes, rho, size in [(100, 0.29, 29), (1000, 0.1, 100), (30, 0.1, 3), (5, 0.1, 1), (10, 0.99, 9)]:
        drawn = sample_classes(classes, rho, generator, "cpu")
        assert len(drawn) == len(set(drawn.tolist())) == size
    counts = torch.zeros(20)
    for _ in range(4000):
        counts[sample_classes(20, 0.25, generator, "cpu")] += 1
    assert (counts / 4000 - 0.25).abs().max() < 0.03  # 4.4 standard deviations
    assert sample_classes(20, 1.0, generator, "cpu") is None


def test_a_fresh_sample_every_step_and_repeatable():
    embeds, centres, ids, valid = case()
    config = ClusterLossConfig(sample_rate=0.3)
    generator = torch.Generator().manual_seed(3)
    first, second = (
        cluster_discrimination_loss(embeds, centres, ids, valid, config, generator=generator).loss for _ in range(2)
    )
    again = cluster_discrimination_loss(
        embeds, centres, ids, valid, config, generator=torch.Generator().manual_seed(3)
    ).loss
    assert first != second
    assert torch.equal(first, again)
    torch.manual_seed(9)
    a = cluster_discrimination_loss(embeds, centres, ids, valid, config).loss
    torch.manual_seed(9)
    assert torch.equal(a, cluster_discrimination_loss(embeds, centres, ids, valid, config).loss)


def test_own_positives_are_no_negatives_but_others_are():
    """A centre gets no pull from the negative term of its own regions, and does from those of another region."""
    embeds, centres, ids, valid = case(sets=[[0, 1, 2], [5]])
    config = ClusterLossConfig(sample_rate=1.0, max_positives=1)
    out = cluster_discrimination_loss(embeds, centres, ids, valid, config, generator=torch.Generator().manual_seed(0))
    picked = pick_positives(ids, valid, 1, torch.Generator().manual_seed(0))[0][0].item()
    grads = torch.autograd.grad(out.per_region[0], centres, retain_graph=True)[0]
    for own in {0, 1, 2} - {picked}:
        assert not grads[own].any()
    assert grads[5].any()


def test_empty_sets_do_not_count():
    embeds, centres, ids, valid = case()
    config = ClusterLossConfig(sample_rate=1.0)
    full = cluster_discrimination_loss(embeds, centres, ids, valid, config)
    rows = valid.any(1)
    some = cluster_discrimination_loss(embeds[rows], centres, ids[rows], valid[rows], config)
    torch.testing.assert_close(full.loss, some.loss)
    assert full.counted.tolist() == rows.tolist()
    none = cluster_discrimination_loss(embeds, centres, ids, torch.zeros_like(valid), config)
    assert none.loss == 0
    grads = torch.autograd.grad(none.loss, (embeds, centres))
    assert all(torch.isfinite(g).all() and not g.any() for g in grads)


def test_padding_is_ignored():
    embeds, centres, ids, valid = case()
    config = ClusterLossConfig(sample_rate=1.0)
    wide = torch.nn.functional.pad(ids, (0, 3), value=3)  # a real class id behind an invalid mark
    wide_valid = torch.nn.functional.pad(valid, (0, 3), value=False)
    a = cluster_discrimination_loss(embeds, centres, ids, valid, config).loss
    b = cluster_discrimination_loss(embeds, centres, wide, wide_valid, config).loss
    torch.testing.assert_close(a, b)


def test_only_directions_count():
    embeds, centres, ids, valid = case()
    config = ClusterLossConfig(sample_rate=1.0)
    a = cluster_discrimination_loss(embeds, centres, ids, valid, config).loss
    b = cluster_discrimination_loss(embeds * 17, centres * 0.01, ids, valid, config).loss
    torch.testing.assert_close(a, b)


def test_half_precision_input_is_computed_in_float32():
    embeds, centres, ids, valid = case(dtype=torch.float32)
    config = ClusterLossConfig(sample_rate=1.0)
    half = embeds.detach().bfloat16()
    exact = cluster_discrimination_loss(half.double(), centres.double(), ids, valid, config).loss
    with torch.autocast("cpu", torch.bfloat16):
        got = cluster_discrimination_loss(half, centres, ids, valid, config).loss
    assert got.dtype == torch.float32
    assert got.item() == pytest.approx(exact.item(), rel=1e-5)


def test_arcface_is_its_true_derivative_and_stays_finite():
    """s sin(theta + m) / sin(theta) per unit of cosine; the straight-through form would give s."""
    config = ClusterLossConfig(margin_form="arcface", sample_rate=1.0)
    theta = torch.tensor(math.acos(0.3), dtype=torch.float64)
    embeds = torch.stack([torch.cos(theta), torch.sin(theta)])[None].requires_grad_()
    centres = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64)
    args = (centres, torch.tensor([[0]]), torch.tensor([[True]]), replace(config, scale=64.0))
    out = cluster_discrimination_loss(embeds, *args)
    s = 64 * torch.cos(theta + 0.3)
    slope = 64 * torch.sin(theta + 0.3) / torch.sin(theta)
    assert slope.item() == pytest.approx(67.1, abs=0.1)
    d_cos = -torch.exp(-s) / (1 + torch.exp(-s)) * slope
    d_cos -= 64 * torch.exp(-64 * torch.cos(theta)) / (1 + torch.exp(-64 * torch.cos(theta)))
    tangent = torch.tensor([-math.sin(theta), math.cos(theta)], dtype=torch.float64)
    (grad,) = torch.autograd.grad(out.loss, embeds)
    assert (grad[0] @ tangent).item() == pytest.approx((d_cos * -torch.sin(theta)).item(), rel=1e-9)

    aligned = torch.tensor([[2.0, 0.0]], requires_grad=True)
    loss = cluster_discrimination_loss(aligned, centres.float(), *args[1:]).loss
    assert torch.isfinite(torch.autograd.grad(loss, aligned)[0]).all()


@pytest.mark.parametrize("form", ["decoupled", "mean_softmax"])
def test_start_value_at_random_initialisation(form):
    """Random directions: s m + log K + s^2 / 2D = 19.2 + 11.5 + 4.0; one region spreads by s / sqrt(D) = 2.8."""
    torch.manual_seed(0)
    regions, dim, classes = 256, 512, 100_000
    embeds, centres = torch.randn(regions, dim), torch.randn(classes, dim) * 0.01
    labels = torch.randint(classes, (regions, 1))
    config = ClusterLossConfig(sample_rate=1.0)
    with torch.no_grad():
        out = cluster_discrimination_loss(
            embeds, centres, labels, torch.ones_like(labels, dtype=torch.bool), config, form=form
        )
    assert out.loss.item() == pytest.approx(34.7, abs=0.6)
    assert 2.0 < out.per_region.std().item() < 3.6
    assert out.correct.sum() == 0


def test_accuracy_counts_the_nearest_centre():
    centres = torch.eye(4)
    embeds = torch.tensor([[1.0, 0.1, 0, 0], [1.0, 0.1, 0, 0], [0, 0, 1.0, 0.9]])
    ids, valid = padded([[0], [1], [3, 2]])
    out = cluster_discrimination_loss(embeds, centres, ids, valid, ClusterLossConfig(sample_rate=1.0))
    assert out.correct.tolist() == [True, False, True]


@pytest.mark.parametrize(
    "bad",
    [
        {"scale": 0.0},
        {"sample_rate": 0.0},
        {"sample_rate": 1.5},
        {"max_positives": 0},
        {"margin_form": "sphere"},
        {"ocr_form": "mean"},
    ],
)
def test_wrong_settings_are_refused_in_one_sentence(bad):
    with pytest.raises(UserError, match=next(iter(bad))):
        ClusterLossConfig(**bad)


def test_row_sparse_gradients_are_the_dense_ones():
    config = ClusterLossConfig(scale=8.0, sample_rate=0.5, max_positives=4)
    gradients = []
    for row_sparse in (False, True):
        embeds, centres, ids, valid = case()
        generator = torch.Generator().manual_seed(2)
        out = cluster_discrimination_loss(
            embeds, centres, ids, valid, config, generator=generator, row_sparse=row_sparse
        )
        out.loss.backward()
        assert centres.grad.is_sparse == row_sparse
        gradients.append((embeds.grad, centres.grad.to_dense()))
    for dense, sparse in zip(*gradients, strict=True):
        torch.testing.assert_close(sparse, dense)


def test_row_sparse_gradients_hold_the_drawn_classes_and_the_positives_alone():
    """Padding and classes of other processes leave no row behind: a lazy optimizer would move it."""
    embeds, centres, ids, valid = case(sets=[[4], [7, 10], []])
    config, sample = ClusterLossConfig(scale=8.0, sample_rate=0.5), torch.tensor([3, 10, 11])
    cluster_discrimination_loss(embeds, centres, ids, valid, config, sample=sample, row_sparse=True).loss.backward()
    assert centres.grad.coalesce().indices().flatten().tolist() == [3, 4, 7, 10, 11]
