"""After the first step: what should move moved, and nothing else did."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from ...vision_towers.errors import UserError
from .parts import Part, part_of_each
from .shards import class_shards

PATIENCE = 10  # steps a part may get only zero gradients (a batch without regions) before the run is stopped
_INTEGER_VIEW = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class AuditError(UserError):
    """A part that should train does not, or a frozen tensor changed."""


@dataclass
class AuditResult:
    """What stage.json keeps of the check. `no_gradient` names trained tensors without a gradient at the first step."""

    step: int
    moved: dict[str, int] = field(default_factory=dict)  # part -> tensors that changed
    trained: dict[str, int] = field(default_factory=dict)  # part -> tensors that should
    frozen_unchanged: int = 0
    no_gradient: list[str] = field(default_factory=list)


class MoveAudit:
    """Take it before the first optimizer step; call `check` after the step, while the gradients still stand."""

    def __init__(self, model: nn.Module, parts: Sequence[Part]) -> None:
        self._model = model
        self._parts = part_of_each(model, parts)
        self._buffers = {
            name: buffer
            for name, buffer in model.named_buffers()
            if any(part.covers(name) and not part.lr for part in parts)
        }
        tensors = dict(model.named_parameters()) | self._buffers
        self._before = {name: checksum(tensor) for name, tensor in tensors.items()}
        self._sharded = any(isinstance(parameter, DTensor) for parameter in model.parameters()) or any(
            shard.group is not None for shard in class_shards(model).values()
        )
        self._result: AuditResult | None = None
        self._steps = 0

    def check(self, step: int) -> AuditResult | None:
        """The result, or None as long as a part has seen nothing but zero gradients (at most `PATIENCE` steps).

        Raises:
            AuditError: a frozen tensor changed, or a trained part did not move.
        """
        self._steps += 1
        if self._result is None:
            self._result = self._first(step)
        result = self._result
        waiting = []
        for part in dict.fromkeys(self._parts.values()):
            if not part.lr or result.moved.get(part.name):
                continue
            mine = [name for name, owner in self._parts.items() if owner is part]
            parameters = dict(self._model.named_parameters())
            gradients = self._anywhere([_has_gradient(parameters[n]) for n in mine])
            # A tensor that only weight decay moved is not trained: movement counts together with a gradient.
            changed = self._anywhere([checksum(parameters[n]) != self._before[n] for n in mine])
            moved = [n for n, graded, different in zip(mine, gradients, changed, strict=True) if graded and different]
            result.moved[part.name], result.trained[part.name] = len(moved), len(mine)
            if moved:
                continue
            if not any(self._anywhere([parameters[n].grad is not None for n in mine])):
                raise AuditError(f"Part {part.name} got no gradient at step {step}: the loss does not depend on it.")
            if any(gradients):
                raise AuditError(
                    f"Part {part.name} did not move at step {step} although it got gradients: its learning rate "
                    f"{part.lr:g} is too small for its dtype {parameters[mine[0]].dtype}."
                )
            if self._steps >= PATIENCE:
                raise AuditError(f"Part {part.name} got only zero gradients in the first {PATIENCE} steps.")
            waiting.append(part.name)
        return None if waiting else result

    def _first(self, step: int) -> AuditResult:
        result = AuditResult(step)
        frozen = {n: p for n, p in self._model.named_parameters() if not self._parts[n].lr} | self._buffers
        for name, tensor in frozen.items():
            if checksum(tensor) != self._before[name]:
                raise AuditError(
                    f"{name} is frozen but changed at step {step}: something else than the optimizer writes it."
                )
        result.frozen_unchanged = len(frozen)
        trained = {n: p for n, p in self._model.named_parameters() if self._parts[n].lr}
        gradients = self._anywhere([_has_gradient(parameter) for parameter in trained.values()])
        result.no_gradient = [name for name, graded in zip(trained, gradients, strict=True) if not graded]
        return result

    def _anywhere(self, flags: list[bool]) -> list[bool]:
        """Which flags are set in any process, where each of them sees another piece of a tensor, or none of it."""
        if not self._sharded:
            return flags
        device = next(self._model.parameters()).device
        shared = torch.tensor(flags, dtype=torch.int32, device=device)
        dist.all_reduce(shared, dist.ReduceOp.MAX)
        return [bool(flag) for flag in shared.tolist()]


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """What this process holds of a tensor that may be cut into shards."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def checksum(tensor: torch.Tensor) -> int:
    """Sum of the tensor's bits read as integers: a training step or a stray write cannot keep it but by a freak."""
    data = local_part(tensor.detach())
    if data.is_complex():
        data = torch.view_as_real(data)
    if data.dtype != torch.bool:
        data = data.contiguous().view(_INTEGER_VIEW[data.element_size()])
    return int(data.sum(dtype=torch.int64))


def _has_gradient(parameter: torch.Tensor) -> bool:
    gradient = parameter.grad
    if gradient is None:
        return False
    return bool((gradient.coalesce().values() if gradient.is_sparse else local_part(gradient)).any())
