"""AdamW over those rows of a table that a step has drawn."""

from __future__ import annotations

import math

import torch
from torch.optim import AdamW

ROWS = 1024  # at a time: what a step needs beside the gradient stays small, and in the cache


class RowAdamW(AdamW):
    """torch's AdamW for parameters with sparse gradients; settings and state are torch's.

    Rows without a gradient stay as they are, and so do their moments: they neither drift nor decay. Partial FC does it
    like this (An et al. 2022, arXiv 2203.15565; `PartialFCAdamW` in insightface's arcface_torch/partial_fc.py): at
    rho = 0.1 a step over all rows would cost ten times as much. t counts the steps of the whole table.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore
        """One step; `JointOptimizer` has called the closure, if there is one."""
        for group in self.param_groups:
            rate, decay, epsilon, (beta1, beta2) = (group[key] for key in ("lr", "weight_decay", "eps", "betas"))
            for table in group["params"]:
                if table.grad is None:
                    continue
                state = self.state[table]
                if not state:
                    state |= {"step": torch.tensor(0.0)}
                    state |= {name: torch.zeros_like(table) for name in ("exp_avg", "exp_avg_sq")}
                state["step"] += 1
                t = state["step"].item()
                scale, root = rate / (1 - beta1**t), math.sqrt(1 - beta2**t)
                gradient = table.grad.coalesce()
                parts = zip(gradient.indices()[0].split(ROWS), gradient.values().split(ROWS), strict=True)
                for rows, g in parts:
                    m = state["exp_avg"][rows].lerp_(g, 1 - beta1)
                    v = state["exp_avg_sq"][rows].mul_(beta2).addcmul_(g, g, value=1 - beta2)
                    # theta <- (1 - rate decay) theta - rate m^ / (sqrt(v^) + epsilon) (Loshchilov and Hutter 2019)
                    theta = table[rows].mul_(1 - rate * decay)
                    theta.addcdiv_(m, (v.sqrt() / root).add_(epsilon), value=-scale)
                    for whole, part in ((state["exp_avg"], m), (state["exp_avg_sq"], v), (table, theta)):
                        whole[rows] = part
