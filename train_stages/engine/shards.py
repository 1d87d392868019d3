"""Tensors of which every process holds another slice (class centres): clipping and checkpoints of their own.

A model names them in `class_shards: dict[str, ClassShard]` (parameters or buffers, by name). Data parallelism leaves
them alone, and a checkpoint holds them whole, so that another number of processes can take it up.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from ..class_shard import ClassShard

SHARDS_FOLDER = "shards"


def class_shards(model: nn.Module) -> Mapping[str, ClassShard]:
    """Name of each sharded tensor of `model` -> which rows this process holds; empty for most models."""
    return getattr(model, "class_shards", {})


def leave_to_model(model: nn.Module) -> None:
    """Tell DistributedDataParallel not to broadcast or average the sharded tensors."""
    names = [name for name, shard in class_shards(model).items() if shard.group is not None]
    if names:
        # torch's own attribute; it looks members of the model itself up as ".name".
        model._ddp_params_and_buffers_to_ignore = [*names, *(f".{name}" for name in names)]  # pyright: ignore


def shared_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that are the same in every process."""
    sharded = class_shards(model)
    return [parameter for name, parameter in model.named_parameters() if name not in sharded]


@torch.no_grad()
def clip_shards(model: nn.Module, max_norm: float) -> None:
    """Scale the gradients of all sharded parameters, of all processes together, down to the norm `max_norm`.

    Apart from the other gradients: theirs is the same norm in every process.
    """
    shards = class_shards(model)
    if not shards or not max_norm:
        return
    held = [model.get_parameter(name) for name in shards if name in dict(model.named_parameters())]
    gradients = [_values(parameter) for parameter in held if parameter.grad is not None]
    device = held[0].device if held else torch.device("cpu")
    square = sum((gradient.float().square().sum() for gradient in gradients), torch.zeros((), device=device))
    group = next(iter(shards.values())).group
    if group is not None:
        dist.all_reduce(square, group=group)
    scale = (max_norm / (square.sqrt() + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        gradient.mul_(scale)


def _values(parameter: nn.Parameter) -> Tensor:
    """The gradient, or what a sparse one holds."""
    assert parameter.grad is not None
    if not parameter.grad.is_sparse:
        return parameter.grad
    parameter.grad = parameter.grad.coalesce()  # a row that stands twice has one gradient
    return parameter.grad._values()


@contextmanager
def without_shards(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Within it, `optimizer` holds no state of sharded parameters: what is saved there would be one process's."""
    parameters = dict(model.named_parameters())
    mine = [parameters[name] for name in class_shards(model) if name in parameters]
    state = optimizer.state
    held: dict[Tensor, Any] = {parameter: state.pop(parameter) for parameter in mine if parameter in state}
    try:
        yield
    finally:
        state.update(held)


def save_shards(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Write the sharded tensors and their optimizer state to `folder`, in every process together."""
    if class_shards(model):
        with _quiet():
            save(_state(model, optimizer), checkpoint_id=folder, no_dist=not dist.is_initialized())


def load_shards(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Take over what `save_shards` wrote, by however many processes."""
    shards = class_shards(model)
    if not shards:
        return
    saved = FileSystemReader(folder).read_metadata().state_dict_metadata
    if optimizer is not None:
        for name, tensor in _sharded(model).items():
            keys = [key.removeprefix(f"{name}.") for key in saved if key.startswith(f"{name}.")]
            for key in keys:  # numbers for each entry, or one number, such as the steps taken
                about: Any = saved[f"{name}.{key}"]
                entries = len(about.size) == tensor.ndim
                scalar = torch.zeros((), dtype=about.properties.dtype, device=_place_of_numbers(optimizer, tensor))
                optimizer.state[tensor][key] = torch.zeros_like(tensor) if entries else scalar
    state = _state(model, optimizer)
    with _quiet():
        load(state, checkpoint_id=folder, no_dist=not dist.is_initialized())


def _place_of_numbers(optimizer: torch.optim.Optimizer, parameter: Tensor) -> torch.device:
    """Where torch wants the count of steps: with the parameter if its group is fused or capturable, else on the CPU."""
    (group,) = (group for group in optimizer.param_groups if any(each is parameter for each in group["params"]))
    there = group.get("fused") or group.get("capturable")
    return parameter.device if there else torch.device("cpu")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's remark that a single process is assumed where there is a single process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _sharded(model: nn.Module) -> dict[str, Tensor]:
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    return {name: tensors[name] for name in class_shards(model)}


def _state(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[str, Any]:
    state: dict[str, Any] = {}
    for name, tensor in _sharded(model).items():
        shard = class_shards(model)[name]
        state[name] = _whole(tensor.detach(), shard)
        for key, value in (optimizer.state.get(tensor, {}) if optimizer else {}).items():
            same_rows = isinstance(value, Tensor) and value.shape == tensor.shape
            state[f"{name}.{key}"] = _whole(value, shard) if same_rows else torch.as_tensor(value)
    return state


def _whole(rows: Tensor, shard: ClassShard) -> Tensor:
    """This process's rows as part of the table of all of them."""
    if shard.group is None:
        return rows
    shape = torch.Size((shard.total, *rows.shape[1:]))
    mesh = DeviceMesh.from_group(shard.group, rows.device.type)
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(rows, mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)


def whole_table(rows: Tensor, shard: ClassShard) -> Tensor:
    """All rows, on the CPU, from every process's (which all have to call this)."""
    whole = _whole(rows.detach(), shard)
    return (whole.full_tensor() if isinstance(whole, DTensor) else whole).cpu()
