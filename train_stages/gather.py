"""Rows of every process together, with gradients: what losses over a global batch need."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def world() -> dist.ProcessGroup | None:
    """All processes; None in a single one."""
    return dist.group.WORLD if dist.is_initialized() else None


def row_counts(rows: int, group: dist.ProcessGroup | None, device: torch.device) -> list[int]:
    """How many rows each process has, in the order of the ranks."""
    if group is None:
        return [rows]
    counts = torch.zeros(group.size(), dtype=torch.int64, device=device)
    counts[group.rank()] = rows
    dist.all_reduce(counts, group=group)
    return counts.tolist()


def gather_rows(rows: Tensor, group: dist.ProcessGroup | None, times: int = 1) -> Tensor:
    """`rows (R_w, ...)` of every process, in the order of the ranks: `(sum R_w, ...)`. R_w may differ, and be 0.

    Backward: each process gets, for its own rows, the sum of the gradients of all processes, `times` that number. In a
    single process it is the identity.
    """
    if group is None:
        return rows
    counts = row_counts(len(rows), group, rows.device)
    return _GatherRows.apply(rows, counts, group, times)  # pyright: ignore


def sum_over_processes(numbers: Sequence[float], device: torch.device) -> list[float]:
    """The sums over all processes, which all have to call this."""
    group = world()
    if group is None:
        return list(numbers)
    sums = torch.tensor(numbers, dtype=torch.float64, device=device)
    dist.all_reduce(sums, group=group)
    return sums.tolist()


def _gather(rows: Tensor, counts: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    """Ragged all-gather: padded to the longest, as not every backend takes pieces of different sizes."""
    padded = rows.new_zeros(max(counts), *rows.shape[1:])
    padded[: len(rows)] = rows
    pieces = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(pieces, padded, group=group)
    return torch.cat([piece[:count] for piece, count in zip(pieces, counts, strict=True)])


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: list[int], group: dist.ProcessGroup, times: int) -> Tensor:
        ctx.counts, ctx.group, ctx.times = counts, group, times
        return _gather(rows, counts, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        total = grads[0].contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        rank = ctx.group.rank()
        first = sum(ctx.counts[:rank])
        return total[first : first + ctx.counts[rank]] * ctx.times, None, None, None
