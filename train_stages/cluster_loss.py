"""The unified region cluster discrimination loss of RICE (paper section 3.3, equations 3 and 4).

One function serves both kinds of region. A region comes with a padded set of positive classes: one cluster for an
object (P = 1), the distinct token ids of its text for an OCR region. With v the L2-normalised region embedding, w_c the
L2-normalised centre of class c and s the scale::

    s_i = s * (cos(v, w_i) - m)      i in Omega_p   positives, with the margin m     (margin_form "cosface")
    s_i = s * cos(theta_i + m)                                                       (margin_form "arcface")
    s_j = s * cos(v, w_j)            j in Omega_n   sampled negatives
    L   = log(1 + sum_i exp(-s_i)) + log(1 + sum_j exp(s_j))                         (form "decoupled")

The paper is silent on, or ambiguous about, the margin form, the reduction over regions and how a token set is brought
to the M of its ablation; those are fields of `ClusterLossConfig`, with our choice as the default.

Every sum over classes goes through `ExpSum`, a (maximum, sum of exponentials) pair. With centres spread over processes
(`class_shard`), only these pairs are reduced before `log_one_plus`: the maximum by MAX, rescaled sums by SUM.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..vision_towers.errors import UserError
from .class_shard import ClassShard, check_shard

MarginForm = Literal["cosface", "arcface"]
LossForm = Literal["decoupled", "mean_softmax"]

# arcface needs sin(theta), whose derivative is infinite at |cos| = 1.
_COS_LIMIT = 1.0 - 1e-6


@dataclass(frozen=True)
class ClusterLossConfig:
    """Numbers and switches of the loss; the defaults are the paper's (section 4.1) where it states them.

    scale: s. margin: m, on positives only.
    margin_form: "cosface" (subtracted from the cosine; our default, the paper does not settle it) or "arcface" (added
        to the angle, with its true derivative).
    ocr_form: form of the loss for regions with many positives. "decoupled" is equation 4; "mean_softmax" (not in the
        paper; the authors' later code) averages one margin-softmax cross-entropy per positive, each with its own
        negatives. Objects always use "decoupled" (equation 3).
    sample_rate: rho; each step draws floor(K * rho) of the K classes, at least one, shared by all regions of the step;
        with centres spread over processes, each draws of its own classes.
    max_positives: M; a longer positive set is cut to a fresh random subset every step, a shorter one is used as it is
        (not in the paper).
    """

    scale: float = 64.0
    margin: float = 0.3
    margin_form: MarginForm = "cosface"
    ocr_form: LossForm = "decoupled"
    sample_rate: float = 0.1
    max_positives: int = 10

    def __post_init__(self) -> None:
        if self.scale <= 0:
            raise UserError(f"scale is {self.scale}, it must be above 0")
        if not 0.0 < self.sample_rate <= 1.0:
            raise UserError(f"sample_rate is {self.sample_rate}, it must be in (0, 1]")
        if self.max_positives < 1:
            raise UserError(f"max_positives is {self.max_positives}, it must be at least 1")
        if self.margin_form not in ("cosface", "arcface"):
            raise UserError(f"margin_form is '{self.margin_form}', use cosface or arcface")
        if self.ocr_form not in ("decoupled", "mean_softmax"):
            raise UserError(f"ocr_form is '{self.ocr_form}', use decoupled or mean_softmax")


class ClusterLossOutput(NamedTuple):
    """loss: mean over the regions that have a positive (0 when none has). per_region: (R,), 0 where not counted.
    correct: (R,) bool, some positive centre is nearer than every sampled negative. counted: (R,) bool.

    With centres spread over processes R counts the regions of all of them, and every process holds the same numbers.
    """

    loss: Tensor
    per_region: Tensor
    correct: Tensor
    counted: Tensor


class ExpSum(NamedTuple):
    """sum_j exp(x_j) of each row, held as `total * exp(top)` with `top` (R,), finite and without gradient."""

    top: Tensor
    total: Tensor


def exp_sum(logits: Tensor, keep: Tensor) -> ExpSum:
    """The sum of exponentials of the kept entries of `logits` (R, n); `keep` is a bool mask of that shape.

    A row with nothing to keep is a plain zero: its `top` is finite, too, and below all others.
    """
    masked = logits.masked_fill(~keep, -torch.inf)
    top = row_max(masked.detach()).clamp(min=torch.finfo(logits.dtype).min / 4)
    # In place, on what nobody else holds: with a million classes each copy counts.
    return ExpSum(top, (masked - top[:, None]).exp_().sum(dim=1))


def row_max(logits: Tensor) -> Tensor:
    """The largest entry of each row, (R,); -inf without columns."""
    return logits.amax(dim=1) if logits.shape[1] else logits.new_full((len(logits),), -torch.inf)


def over_shards(parts: ExpSum, shard: ClassShard) -> ExpSum:
    """The sum over all classes from those over each process's."""
    if shard.processes == 1:
        return parts
    top = shard.max(parts.top)
    return ExpSum(top, shard.sum(parts.total * (parts.top - top).exp()))


def times_exp(parts: ExpSum, shift: Tensor) -> ExpSum:
    """sum_j exp(x_j + shift) of each row; shift: (R,)."""
    top = (parts.top + shift).detach()
    # The gradient goes through the factor, which is 1 but for rounding.
    return ExpSum(top, parts.total * (parts.top + shift - top).exp())


def log_one_plus(parts: ExpSum) -> Tensor:
    """log(1 + sum_j exp(x_j)) per row, exact for sums far below and far above 1. Shape (R,).

    With x = log sum_j exp(x_j) it is softplus(x): the 1 is never added to a number that is not of its size.
    """
    empty = parts.total == 0
    log_sum = parts.top + parts.total.masked_fill(empty, 1.0).log()
    return F.softplus(log_sum, threshold=40.0).masked_fill(empty, 0.0)


def sample_classes(num_classes: int, sample_rate: float, generator: torch.Generator | None, device) -> Tensor | None:
    """A uniform subset of max(1, floor(K * rho)) of K classes, (k,) int64; None stands for all of them (rho = 1)."""
    if sample_rate >= 1.0:
        return None
    floor = math.floor(num_classes * sample_rate + 1e-9)  # 100 * 0.29 is 28.999...: the user means 29
    size = min(num_classes, max(1, floor))
    source = torch.device("cpu") if generator is None else generator.device
    return torch.randperm(num_classes, generator=generator, device=source)[:size].to(device)


def pick_positives(
    positives: Tensor, valid: Tensor, max_positives: int, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Cut padded positive sets (R, P) to at most M columns: a random subset of each longer set, others untouched."""
    if positives.shape[1] <= max_positives:
        return positives, valid
    source = torch.device("cpu") if generator is None else generator.device
    order = torch.rand(positives.shape, generator=generator, device=source).to(positives.device)
    picked = order.masked_fill(~valid, -1.0).topk(max_positives, dim=1).indices
    return positives.gather(1, picked), valid.gather(1, picked)


def cluster_discrimination_loss(
    embeds: Tensor,
    centres: Tensor,
    positives: Tensor,
    valid: Tensor,
    config: ClusterLossConfig,
    *,
    form: LossForm = "decoupled",
    generator: torch.Generator | None = None,
    shard: ClassShard | None = None,
    sample: Tensor | None = None,
    row_sparse: bool = False,
) -> ClusterLossOutput:
    """RICE's region loss.

    embeds: (R, D) region embeddings, any scale. centres: (K, D) class centres, any scale.
    positives: (R, P) int64 class ids, padded; valid: (R, P) bool, which of them are real. A row's ids are a set; an id
        that stands twice counts twice. A row with no valid id is left out of the mean.
    form: "decoupled" (equations 3 and 4) or "mean_softmax".
    generator: source of the sampling; None uses torch's global CPU generator, which trainers save and restore.
    shard: the classes that this process holds, when K centres are spread over processes: `centres` is then its slice,
        the regions are its own (their number may differ), class ids count over all K, and every process has to call
        this together. The loss is that over the regions of all processes; the gradient of `centres` is its exact
        gradient, that of `embeds` the exact one times the number of processes, for data parallelism to average.
    sample: int64 ids, the negatives to use instead of a fresh draw.
    row_sparse: the gradient of `centres` is a sparse tensor of the rows that took part, where not all did (rho < 1):
        memory and time then grow with rho K instead of K. `centres` is a leaf.

    The sampled classes are shared by all regions of the step, as in Partial FC. A region's own positives, also those
    that `max_positives` left out, are never its negatives; positives of other regions are. So a region has
    floor(K * rho) negatives less those of its own positives that were drawn.

    Computed in float32 at least, whatever the input and autocast say.

    Raises:
        UserError: `centres` are not the shard's.
    """
    shard = shard or ClassShard.whole(len(centres))
    check_shard(shard, len(centres))
    with torch.autocast(embeds.device.type, enabled=False):
        dtype = torch.promote_types(torch.promote_types(embeds.dtype, centres.dtype), torch.float32)
        chosen, chosen_valid = pick_positives(positives, valid, config.max_positives, generator)
        # Ids with -1 for padding, picked where the region is, so that all processes see the same.
        own = shard.gather_ids(positives.masked_fill(~valid, -1))
        chosen = shard.gather_ids(chosen.masked_fill(~chosen_valid, -1))
        v = shard.gather_rows(F.normalize(embeds.to(dtype), dim=-1))
        rows_of = partial(F.embedding, weight=centres, sparse=row_sparse)

        # Cosines to the positives that this process holds; the others stay 0 and are hidden by `here`.
        row, here = shard.local(chosen)  # (R, M)
        region, slot = here.nonzero(as_tuple=True)
        cos = (F.normalize(rows_of(row[region, slot]).to(dtype), dim=-1) * v[region]).sum(dim=-1)
        cos_pos = v.new_zeros(row.shape).index_put((region, slot), cos)
        s_pos = config.scale * _with_margin(cos_pos, config)
        draw = partial(_negatives, v, centres, rows_of, own, config, generator, shard, sample)

        if form == "decoupled":
            s_neg, keep = draw()
            positive, negative = exp_sum(-s_pos, here), exp_sum(s_neg, keep)
            per_region = sum(log_one_plus(over_shards(part, shard)) for part in (positive, negative))
        else:
            s_pos = shard.sum(s_pos.masked_fill(~here, 0.0))
            per_region, s_neg, keep = _mean_softmax(s_pos, chosen >= 0, draw, config, shard)
        assert isinstance(per_region, Tensor)

        counted = (chosen >= 0).any(dim=1)
        per_region = per_region.masked_fill(~counted, 0.0)
        loss = per_region.sum() / counted.sum().clamp(min=1)
        with torch.no_grad():
            best_negative = _largest(s_neg, keep, shard)
            best_positive = _largest(config.scale * cos_pos, here, shard)
            correct = counted & (best_positive > best_negative)
    return ClusterLossOutput(loss, per_region, correct, counted)


def _with_margin(cos: Tensor, config: ClusterLossConfig) -> Tensor:
    if config.margin_form == "cosface":
        return cos - config.margin
    cos = cos.clamp(-_COS_LIMIT, _COS_LIMIT)
    return cos * math.cos(config.margin) - (1.0 - cos * cos).sqrt() * math.sin(config.margin)


def _negatives(
    v: Tensor,
    centres: Tensor,
    rows_of: Callable[[Tensor], Tensor],
    own: Tensor,
    config: ClusterLossConfig,
    generator: torch.Generator | None,
    shard: ClassShard,
    sample: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Scaled cosines (R, k) to a sample of this process's classes, and the mask that hides each region's own positives.

    own: (R, P) class ids, -1 = padding.
    """
    row, here = shard.local(own)
    if sample is not None:
        rows, inside = shard.local(sample)
        drawn = rows[inside]
    else:
        drawn = sample_classes(shard.size, config.sample_rate, generator, v.device)
    if drawn is None:
        column, size = row, shard.size
        weight = centres
    else:
        column_of = torch.full((max(1, shard.size),), -1, device=v.device).scatter_(
            0, drawn, torch.arange(len(drawn), device=v.device)
        )
        column, size = column_of[row], len(drawn)
        weight = rows_of(drawn)
    s_neg = config.scale * (v @ F.normalize(weight.to(v.dtype), dim=-1).T)
    # Positives that are padding, elsewhere or not drawn go to a spare last column.
    column = torch.where(here & (column >= 0), column, size)
    hidden = torch.zeros(len(v), size + 1, dtype=torch.bool, device=v.device).scatter_(1, column, True)
    return s_neg, ~hidden[:, :size]


def _mean_softmax(
    s_pos: Tensor,
    s_valid: Tensor,
    draw: Callable[[], tuple[Tensor, Tensor]],
    config: ClusterLossConfig,
    shard: ClassShard,
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean over the chosen positives of log(1 + sum_j exp(s_j - s_i)), a softmax cross-entropy with its own sample."""
    total = s_pos.new_zeros(len(s_pos))
    s_neg, keep = draw()
    negatives = over_shards(exp_sum(s_neg, keep), shard)
    for slot in range(s_pos.shape[1]):
        if slot and config.sample_rate < 1.0:
            s_neg, keep = draw()
            negatives = over_shards(exp_sum(s_neg, keep), shard)
        cross_entropy = log_one_plus(times_exp(negatives, -s_pos[:, slot]))
        total = total + cross_entropy.masked_fill(~s_valid[:, slot], 0.0)
    return total / s_valid.sum(dim=1).clamp(min=1), s_neg, keep


def _largest(logits: Tensor, keep: Tensor, shard: ClassShard) -> Tensor:
    """The largest kept logit of each row over all classes; -inf where there is none."""
    return shard.max(row_max(logits.masked_fill(~keep, -torch.inf)))
