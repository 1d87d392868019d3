"""Symmetric InfoNCE over the pairs of all processes, in memory that grows with the batch and not with its square.

For pairs (a_i, b_i), i = 1 .. n, of length 1 and an inverse temperature s (CLIP; CLOC, arXiv 2410.02746, Eq. 2)::

    L_ab = -1/n sum_i log( exp(s a_i.b_i) / sum_j exp(s a_i.b_j) )        L = (L_ab + L_ba) / 2

Of two texts b that say nearly the same, one is no negative of the other (CLOC, Sec. 3.4): where b_i.b_j > 0.9, j is
left out of both sums over i. The positive itself always stays.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .gather import gather_rows, row_counts

MAX_LOGIT_SCALE = math.log(100.0)
CHUNK = 1024  # rows of logits that are in memory together


class ContrastiveOutput(NamedTuple):
    """loss: scalar; its mean over processes is L, and so is the gradient that data parallelism averages.
    correct: (n_w,) bool, whether each a of this process is nearer to its own b than to its negatives, of all in the
    global batch. What `same_above` leaves out is none of them; where it leaves nothing, correct is True."""

    loss: Tensor
    correct: Tensor


def contrastive_loss(
    a: Tensor,
    b: Tensor,
    logit_scale: Tensor,
    *,
    same_above: float | None = None,
    group: dist.ProcessGroup | None = None,
    chunk: int = CHUNK,
) -> ContrastiveOutput:
    """The loss over the pairs of all processes of `group` (None: this one alone).

    Args:
        a, b: `(n_w, D)`, any scale; pair i is row i of both. n_w may differ between processes, and be 0.
        logit_scale: log of s, of one element, kept at or below log 100.
        same_above: cosine of two b above which they count as the same; None: never.
        chunk: rows of logits at a time; each chunk is computed again in the backward pass.

    Computed in float32 at least, whatever the input and autocast say.
    """
    with torch.autocast(a.device.type, enabled=False):
        dtype = torch.promote_types(a.dtype, torch.float32)
        a, b = F.normalize(a.to(dtype), dim=-1), F.normalize(b.to(dtype), dim=-1)
        scale = logit_scale.to(dtype).reshape(()).clamp(max=MAX_LOGIT_SCALE).exp()
        counts = row_counts(len(a), group, a.device)
        rank, total = (0 if group is None else group.rank()), sum(counts)
        every_a, every_b = gather_rows(a, group), gather_rows(b, group)
        first = sum(counts[:rank])
        # Touches everything, so that every process takes part in the backward pass of the gathering.
        loss = 0.0 * (every_a.sum() + every_b.sum() + scale)
        correct = [torch.zeros(0, dtype=torch.bool, device=a.device)]
        for start in range(0, len(a), chunk):
            mine = slice(start, start + chunk)
            own = torch.arange(first + start, first + start + len(a[mine]), device=a.device)
            part, nearest = checkpoint(  # pyright: ignore
                _both_ways, a[mine], b[mine], every_a, every_b, scale, own, same_above, use_reentrant=False
            )
            loss = loss + part / (2 * max(1, total))
            correct.append(nearest)
        return ContrastiveOutput(loss * len(counts), torch.cat(correct))


def _both_ways(
    a: Tensor,
    b: Tensor,
    every_a: Tensor,
    every_b: Tensor,
    scale: Tensor,
    own: Tensor,
    same_above: float | None,
) -> tuple[Tensor, Tensor]:
    """Sums over a chunk of pairs of the cross-entropies of a_i among all b and of b_i among all a, and for which pairs
    b_i is the nearest of those b that are not left out. own: `(n,)`, the columns of the pairs.

    What is as wide as the global batch, also which texts are the same, is made in here: it must not outlive its chunk.
    """
    # Which texts say the same depends on the pair of texts alone, so it serves both directions.
    same = None if same_above is None else _same(b, every_b, own, same_above)
    forth, nearest = _rows(a, every_b, scale, own, same)
    back, _ = _rows(b, every_a, scale, own, same)
    return forth + back, nearest


def _rows(rows: Tensor, columns: Tensor, scale: Tensor, own: Tensor, same: Tensor | None) -> tuple[Tensor, Tensor]:
    """Sum over rows of the cross-entropy of each row's own column, and which rows have it as their largest."""
    logits = scale * rows @ columns.T
    if same is not None:
        logits = logits.masked_fill(same, -torch.inf)
    return F.cross_entropy(logits, own, reduction="sum"), logits.detach().argmax(dim=1) == own


@torch.no_grad()
def _same(texts: Tensor, every_text: Tensor, own: Tensor, above: float) -> Tensor:
    """`(n, total)` bool: another text that says the same."""
    same = texts @ every_text.T > above
    return same.scatter_(1, own[:, None], False)
