"""A model whose parameters were cut into shards, whole again for saving."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 or ZeRO-3 holds the parameters in pieces."""
    return any(map(is_shard, model.parameters()))


def is_shard(parameter: torch.Tensor) -> bool:
    """Whether this is a piece of a parameter that FSDP2 or ZeRO-3 has cut up."""
    return isinstance(parameter, DTensor) or hasattr(parameter, "ds_id")


@torch.no_grad()
def make_whole(model: nn.Module, wrapped: Any, accelerator: Any, keep: bool) -> None:
    """Every process calls this; where `keep`, the parameters of `model` are whole and on the CPU afterwards.

    Elsewhere they are as they were. The model is no longer for training. Parameters that are one stay one.

    wrapped: what accelerate made of the model.
    """
    if not is_sharded(model):
        return
    zero = any(hasattr(parameter, "ds_id") for parameter in model.parameters())
    state: dict[str, torch.Tensor] = accelerator.get_state_dict(wrapped) if zero else {}
    every_name = list(model.named_parameters(remove_duplicate=False))
    made: dict[int, nn.Parameter] = {}
    for name, parameter in model.named_parameters():  # each once: all processes must take part in as many gatherings
        if zero:
            whole = state[name] if keep else parameter  # the first process alone was given the tensors
        else:
            whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        if keep:
            made[id(parameter)] = nn.Parameter(whole.detach().cpu(), requires_grad=parameter.requires_grad)
    for name, parameter in every_name if keep else []:
        owner, _, leaf = name.rpartition(".")
        model.get_submodule(owner)._parameters[leaf] = made[id(parameter)]
