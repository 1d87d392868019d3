"""`train.compile`: the blocks of a model run as compiled code while it trains."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from ...vision_towers.errors import UserError


@contextmanager
def compiled_blocks(model: nn.Module, device: torch.device, enabled: bool = True) -> Iterator[Sequence[nn.Module]]:
    """Within it, the blocks of `model` go through `torch.compile`; yields them. Weights keep their names.

    A block is what transformers marks as a layer that can be checkpointed. Blocks of one class share one program, which
    takes seconds to make where a whole model takes minutes; sizes are dynamic, so that batches of other lengths need no
    other program.

    Raises:
        UserError: on a CPU, when there is no C++ compiler.
    """
    if not enabled:
        yield ()
        return
    if device.type == "cpu" and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++"))):
        raise UserError("train.compile needs a C++ compiler on a CPU: install g++, or set train.compile to false.")
    blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    try:
        for block in blocks:
            block.compile(dynamic=True)
        yield blocks
    finally:
        for block in blocks:
            block._compiled_call_impl = None  # what `nn.Module.compile` sets; torch has no public way back
