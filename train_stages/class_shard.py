"""Class centres spread over processes (Partial FC, An et al. 2022, Sec. 3.2): who holds which, and sums over all.

Every process holds a slice of the K centres and works on the regions of all processes. A row of K logits never exists:
what is exchanged is one embedding a region, and one number a region for each maximum or sum.

All of it is the identity in a single process.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..vision_towers.errors import UserError
from .gather import gather_rows


@dataclass(frozen=True)
class ClassShard:
    """Classes `first` ... `first + size - 1` of `total`. With `group` None it is all of them, in one process."""

    total: int
    first: int
    size: int
    group: dist.ProcessGroup | None = None

    @classmethod
    def whole(cls, total: int) -> ClassShard:
        """Every class in this process."""
        return cls(total, 0, total)

    @classmethod
    def mine(cls, total: int, group: dist.ProcessGroup | None = None) -> ClassShard:
        """This process's part of `total` classes (of the default group, when there is one).

        The split is that of `torch.chunk` and of DTensor's `Shard(0)`: ceil(K / W) each, the last processes less.
        """
        if not dist.is_initialized():
            return cls.whole(total)
        group = group or dist.group.WORLD
        assert group is not None
        step = -(-total // group.size())
        first = min(group.rank() * step, total)
        return cls(total, first, min(step, total - first), group)

    @property
    def processes(self) -> int:
        """How many processes share the classes."""
        return 1 if self.group is None else self.group.size()

    def local(self, classes: Tensor) -> tuple[Tensor, Tensor]:
        """Class ids -> (row of this process's table, 0 where it is elsewhere; bool, whether it is here)."""
        here = (classes >= self.first) & (classes < self.first + self.size)
        return (classes - self.first).masked_fill(~here, 0), here

    # ---- what processes exchange ----

    def gather_rows(self, rows: Tensor) -> Tensor:
        """`rows (R_w, D)` of every process, in the order of the ranks: `(sum R_w, D)`. R_w may differ, and be 0.

        Backward: each process gets the sum of the gradients of all of them for its own rows, times the number of
        processes. Each computes the same loss, and data parallelism averages gradients over processes; the factor makes
        that average the gradient of this loss.
        """
        return gather_rows(rows, self.group, self.processes)

    def gather_ids(self, ids: Tensor, fill: int = -1) -> Tensor:
        """`ids (R_w, P_w)` int64 of every process: `(sum R_w, max P_w)`, narrower ones filled up with `fill`."""
        if self.group is None:
            return ids
        width = torch.tensor([ids.shape[1]], device=ids.device)
        dist.all_reduce(width, dist.ReduceOp.MAX, group=self.group)
        padded = torch.full((len(ids), int(width)), fill, dtype=ids.dtype, device=ids.device)
        padded[:, : ids.shape[1]] = ids
        return gather_rows(padded, self.group)

    def sum(self, values: Tensor) -> Tensor:
        """The sum over processes, with the gradient of each one's own addend (all of them compute the same loss)."""
        return values if self.group is None else _Sum.apply(values, self.group)  # pyright: ignore

    def max(self, values: Tensor) -> Tensor:
        """The largest over processes, without gradient."""
        if self.group is None:
            return values.detach()
        values = values.detach().clone()
        dist.all_reduce(values, dist.ReduceOp.MAX, group=self.group)
        return values


def check_shard(shard: ClassShard, rows: int) -> None:
    """Raises UserError when a table of `rows` centres is not this process's part."""
    if rows != shard.size:
        raise UserError(f"this process holds {shard.size} of {shard.total} classes, and got a table of {rows} centres.")


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, group: dist.ProcessGroup) -> Tensor:
        total = values.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None
