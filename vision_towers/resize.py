"""A tower at another input resolution."""

import copy
from typing import Any

import torch
from torch.nn import functional
from transformers import PreTrainedModel

from .describe import describe_tower
from .errors import UserError
from .wrapped_model import WrappedVisionModel


def resize_tower(tower: PreTrainedModel, image_size: int) -> PreTrainedModel:
    """The same tower for square inputs of `image_size` pixels a side.

    Rotary and sinusoidal positions follow by themselves. A learned table is interpolated (bicubic, as transformers does
    for one input) and kept so: train the tower a little afterwards. The tower is taken over.

    Raises:
        UserError: `image_size` is not a positive multiple of the patch.
    """
    spec = describe_tower(tower.config)
    if image_size <= 0 or image_size % spec.patch_size:
        raise UserError(
            f"an image of {image_size} px is no whole number of patches of {spec.patch_size} px; the nearest size is "
            f"{max(1, round(image_size / spec.patch_size)) * spec.patch_size}."
        )
    if image_size == spec.image_size:
        return tower
    if not isinstance(tower, WrappedVisionModel):
        return _resized(tower, image_size)
    tower.tower = _resized(tower.tower, image_size)
    tower.config.tower_config, tower.config.image_size = tower.tower.config, image_size
    tower.spec = describe_tower(tower.tower.config)
    return tower


def _resized(native: PreTrainedModel, image_size: int) -> PreTrainedModel:
    config = copy.deepcopy(native.config)
    config.image_size = image_size
    old, side = describe_tower(native.config), image_size // describe_tower(config).patch_size
    new: Any = type(native)._from_config(
        config, dtype=native.dtype, attn_implementation=native.config._attn_implementation
    )
    shapes = {name: tensor.shape for name, tensor in new.state_dict().items()}
    grid = old.grid(old.image_size, old.image_size)
    # The only tensors whose shape depends on the input's size are tables of positions.
    state = {
        name: tensor if tensor.shape == shapes[name] else _interpolated(tensor, grid, side)
        for name, tensor in native.state_dict().items()
    }
    new.load_state_dict(state)
    return new.to(native.device).train(native.training)


def _interpolated(table: torch.Tensor, grid: tuple[int, int], side: int) -> torch.Tensor:
    """A table `(..., prefix + rows * columns, D)` for `side * side` patches; rows before the patches are kept."""
    prefix = table.shape[-2] - grid[0] * grid[1]
    flat = table.reshape(-1, table.shape[-1])
    patches = flat[prefix:].float().view(1, *grid, -1).permute(0, 3, 1, 2)
    patches = functional.interpolate(patches, size=(side, side), mode="bicubic", align_corners=False)
    patches = patches.permute(0, 2, 3, 1).reshape(side * side, -1).to(table.dtype)
    return torch.cat([flat[:prefix], patches]).view(*table.shape[:-2], prefix + side * side, -1)
