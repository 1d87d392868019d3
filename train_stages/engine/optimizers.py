"""The optimizers a recipe can name, each over the groups of `parts.parameter_groups`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import SGD, AdamW, Muon, Optimizer

from ..train_config import TrainConfig


def build_optimizer(groups: list[dict], train: TrainConfig, device: str) -> Optimizer:
    """The optimizer of `train` (torch's own implementations).

    Args:
        groups: with the keys of `parameter_groups`; those with `"muon": True` hold matrices only.
        device: type of the parameters' device; where torch has a fused AdamW, it is used.
    """
    if train.optimizer == "sgd":
        return SGD(groups, lr=0.0)
    adamw: dict[str, Any] = {"lr": 0.0, "betas": train.betas, "fused": device in ("cpu", "cuda")}
    if train.optimizer == "muon":
        return MuonAndAdamW(groups, adamw)
    return AdamW(groups, **adamw)


class MuonAndAdamW(Optimizer):
    """Muon for the groups that ask for it, AdamW for the others, behind one `step` and one state.

    Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) replaces the momentum of a hidden matrix by the
    nearest orthogonal matrix. `match_rms_adamw` (Liu et al. 2025, arXiv 2502.16982, Sec. 2.2) scales that update to the
    size of AdamW's, so that learning rates and weight decay mean the same for both.

    Works on whole matrices: not for parameters that FSDP or ZeRO cut into shards.
    """

    def __init__(self, groups: list[dict], adamw: dict[str, Any]) -> None:
        hidden = [group for group in groups if group["muon"]]
        others = [group for group in groups if not group["muon"]]
        self._optimizers: list[tuple[Optimizer, bool]] = []
        if hidden:
            self._optimizers.append((Muon(hidden, lr=0.0, adjust_lr_fn="match_rms_adamw"), True))
        if others:
            self._optimizers.append((AdamW(others, **adamw), False))
        # Both have filled in their own settings: the groups are complete, and the same objects in all three.
        super().__init__([*hidden, *others], {})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyright: ignore
        """One step of both."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for optimizer, is_muon in self._optimizers:
            # Shared anew each time: loading a state puts new objects in place of the old ones.
            optimizer.param_groups = [group for group in self.param_groups if group["muon"] == is_muon]
            optimizer.state = self.state
            optimizer.step()
        return loss
