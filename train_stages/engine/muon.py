"""Muon whose Newton-Schulz iteration runs in float32, for processors."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.optim import Muon


class Float32Muon(Muon):
    """torch's Muon with `match_rms_adamw`, but for the precision of its iteration; settings and state are torch's.

    torch iterates in bf16, which is right for GPUs. A processor without bf16 units takes several times as long for it
    as for float32: with small models, longer than for the forward and the backward pass together.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore
        """One step; `JointOptimizer` has called the closure, if there is one."""
        for group in self.param_groups:
            momentum, rate = group["momentum"], group["lr"]
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(weight.grad)
                average = state["momentum_buffer"].lerp_(weight.grad, 1 - momentum)
                direction = weight.grad.lerp(average, momentum)  # Nesterov's
                weight.mul_(1 - rate * group["weight_decay"])
                scale = 0.2 * math.sqrt(max(weight.shape))  # the size of AdamW's updates: Liu et al. 2025, Sec. 2.2
                orthogonal = orthogonalized(direction, group["ns_coefficients"], group["ns_steps"], group["eps"])
                weight.add_(orthogonal, alpha=-rate * scale)


def orthogonalized(matrix: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """About U V^T of `matrix` = U S V^T, in float32: singular values end between 0.7 and 1.2 or so.

    Newton-Schulz (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon): from X = matrix / ||matrix||_F,
    `steps` times X <- a X + (b A + c A A) X with A = X X^T.
    """
    a, b, c = coefficients
    x = matrix.float()
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x  # A is the smaller of the two Gram matrices
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.T if tall else x).to(matrix.dtype)
