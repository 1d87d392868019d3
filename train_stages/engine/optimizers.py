"""The optimizers a recipe can name, each over the groups of `parts.parameter_groups`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.optim import SGD, AdamW, Muon, Optimizer

from ...vision_towers.errors import UserError
from ..train_config import TrainConfig
from .muon import Float32Muon
from .row_adamw import RowAdamW
from .whole_model import is_shard


def build_optimizer(groups: list[dict], train: TrainConfig, device: str, cut_later: bool = False) -> Optimizer:
    """The optimizer of `train` (torch's own implementations; Muon on processors in float32).

    Args:
        groups: of `parameter_groups`; those with `"method": "muon"` hold matrices only.
        device: type of the parameters' device; where torch has a fused AdamW, it is used.
        cut_later: the parameters are whole now and will be cut into shards, as FSDP and DeepSpeed do it.

    Raises:
        UserError: muon, for parameters in shards.
    """
    if train.optimizer == "muon" and (cut_later or any(is_shard(each) for group in groups for each in group["params"])):
        raise UserError(
            "train.optimizer is muon, which works on whole matrices, and FSDP or DeepSpeed cuts them into shards: set "
            "train.optimizer=adamw, or launch with ddp."
        )
    if train.optimizer == "sgd":
        for group in groups:
            if group["method"] == "row_adamw":
                group["weight_decay"] = 0.0  # torch's SGD does not decay by rows
        return SGD(groups, lr=0.0)
    adamw: dict[str, Any] = {"lr": 0.0, "betas": train.betas, "fused": device in ("cpu", "cuda")}
    if {group["method"] for group in groups} == {"adamw"}:
        return AdamW(groups, **adamw)
    make: dict[str, Callable[[list[dict]], Optimizer]] = {
        # Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) replaces the momentum of a hidden matrix
        # by the nearest orthogonal matrix. `match_rms_adamw` (Liu et al. 2025, arXiv 2502.16982, Sec. 2.2) scales that
        # update to the size of AdamW's, so that learning rates and weight decay mean the same for both.
        "muon": lambda mine: (Float32Muon if device == "cpu" else Muon)(mine, lr=0.0, adjust_lr_fn="match_rms_adamw"),
        "adamw": lambda mine: AdamW(mine, **adamw),
        "row_adamw": lambda mine: RowAdamW(mine, lr=0.0, betas=train.betas),
    }
    return JointOptimizer(groups, make)


class JointOptimizer(Optimizer):
    """An optimizer for each `method` of the groups, behind one `step` and one state."""

    def __init__(self, groups: list[dict], make: Mapping[str, Callable[[list[dict]], Optimizer]]) -> None:
        methods = sorted({group["method"] for group in groups})
        by_method = {method: [group for group in groups if group["method"] == method] for method in methods}
        self._optimizers = {method: make[method](mine) for method, mine in by_method.items()}
        # Each has filled in its own settings: the groups are complete, and the same objects here and there.
        super().__init__([group for mine in by_method.values() for group in mine], {})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyright: ignore
        """One step of each."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for method, optimizer in self._optimizers.items():
            # Shared anew each time: loading a state puts new objects in place of the old ones.
            optimizer.param_groups = [group for group in self.param_groups if group["method"] == method]
            optimizer.state = self.state
            optimizer.step()
        return loss
