"""From a native ViT to one of ours and back, in memory: no tensor is copied."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

from .describe import describe_tower
from .rice_config import RiceVisionConfig
from .rice_model import RiceVisionModel, on_tensors_of
from .roi_model import RoiVisionModel


def lift_tower(tower: PreTrainedModel) -> PreTrainedModel:
    """A loaded tower with a region readout, as `load_tower` would have opened it: `mlcd_vision_model` becomes a
    `RiceVisionModel`, every other native ViT a `RoiVisionModel`; a tower with a readout is returned as it is.

    The tower is taken over: both share their tensors.

    Raises:
        UserError: the `model_type` is not registered.
    """
    if describe_tower(tower.config).region_readout != "none":
        return tower
    return _LIFTS.get(type(tower.config).model_type, RoiVisionModel.from_native)(tower)


def plain_tower(tower: PreTrainedModel) -> PreTrainedModel:
    """The native ViT of a tower, when it is all that a LLaVA without boxes needs, else the tower as one of ours.

    There are two reasons to be ours: a LLaVA would see other image tokens of the native ViT (`same_tokens`); or the
    readout has learned parameters, which the native ViT would lose.
    """
    native = _native(tower)
    stays = same_tokens(tower) and len(native.state_dict()) == len(tower.state_dict())
    return native if stays else lift_tower(tower)


def same_tokens(tower: PreTrainedModel) -> bool:
    """Whether a LLaVA sees the same image tokens of a tower and of the native ViT inside it: not of one with register
    tokens, which ours leave out, nor of one that merges tokens on the way (`reduce_after`)."""
    registers = describe_tower(_native(tower).config).num_prefix_tokens > 1
    return not registers and getattr(tower.config, "reduce_after", None) is None


def _native(tower: Any) -> PreTrainedModel:
    return tower if describe_tower(tower.config).region_readout == "none" else tower.to_native()


def _to_rice(native: Any) -> RiceVisionModel:
    config = RiceVisionConfig.from_native(native.config)
    config._attn_implementation = native.config._attn_implementation
    with torch.device("meta"):
        rice = RiceVisionModel(config)
    return on_tensors_of(native, rice)


_LIFTS: dict[str, Callable[[Any], PreTrainedModel]] = {"mlcd_vision_model": _to_rice}
