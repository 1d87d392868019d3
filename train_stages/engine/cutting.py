"""What has to be right before FSDP or DeepSpeed cuts a model over the processes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy

from ...vision_towers.errors import UserError
from .shards import class_shards


def before_cutting(model: nn.Module, fsdp_plugin: Any = None) -> None:
    """Get `model` and accelerate's plugin ready. Without a plugin it is DeepSpeed that cuts.

    Raises:
        UserError: the model has class centres of which every process holds a slice already.
    """
    if any(shard.group is not None for shard in class_shards(model).values()):
        raise UserError(
            "Every process holds its own slice of this model's class centres, and FSDP or DeepSpeed would cut the "
            "slices once more or average them: launch with ddp."
        )
    if fsdp_plugin is None:
        return
    name_blocks(model)
    policy = fsdp_plugin.mixed_precision_policy
    if isinstance(policy, MixedPrecisionPolicy):
        # Boxes stay float32, and so does the loss: autocast does inside what the casts would do at the door.
        fsdp_plugin.mixed_precision_policy = replace(policy, cast_forward_inputs=False, output_dtype=None)


def name_blocks(model: nn.Module) -> None:
    """Write the classes that the parts of `model` name as not to be split where accelerate looks, on `model` itself.

    Those that the model does not have are left out (a CLIP tower names its text tower's, too): accelerate refuses them.
    """
    modules = list(model.modules())
    named = {name for module in modules for name in getattr(module, "_no_split_modules", None) or ()}
    model._no_split_modules = named & {type(module).__name__ for module in modules}  # pyright: ignore
