"""Another vision tower for an existing LLaVA. The language model is kept as it is, tensor for tensor."""

import copy
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..vision_towers import UserError
from ..vision_towers.lift import lift_tower, plain_tower
from .follow_tower import family_of, follow_in_config, follow_in_processor
from .fresh import fresh_part

TOWER, PROJECTOR, REGION_PROJECTOR = "vision_tower", "multi_modal_projector", "region_projector"


def swap_vision_tower(
    model: PreTrainedModel,
    processor,
    tower: PreTrainedModel,
    *,
    feature_layer: int | None = None,
    keep_projector: bool = False,
) -> tuple[Any, Any]:
    """The same LLaVA on another tower, with everything that has to agree with the tower following it.

    The class of the model stays. A tower of ours becomes the native ViT inside it when that says the same to a model
    without boxes (RICE always does), so that plain transformers opens the result. A tower with registers is wrapped in
    ours, which leaves them out. A model that reads boxes goes on reading them: its tower has a readout. The tower's
    weights are rounded to the dtype of the language model. The projectors are new: untrained, until they are aligned.

    Args:
        model: a Llava, LlavaNext, LlavaOnevision, VipLlava, RegionLlava or RegionLlavaNext. Its language model is taken
            over, not copied; so is the tower.
        processor: the model's; the given one is not changed.
        tower: from `load_tower`, or any native ViT that is registered.
        feature_layer: `hidden_states` entry for the language model; the tower's default when absent (a VipLlava keeps
            its own list of layers).
        keep_projector: keep the trained projector(s); needs a tower of the old one's width.
    Returns:
        (model, processor). The model may lie on the meta device: the tower and the new projector are then the only
        parts with memory.
    Raises:
        UserError: another kind of model, a quantised one, or a tower that does not fit it.
    """
    tower = lift_tower(tower) if family_of(model.config).regions else plain_tower(tower)
    return put_tower(model, processor, tower, feature_layer=feature_layer, keep_projector=keep_projector)


def put_tower(
    model: PreTrainedModel,
    processor,
    tower: PreTrainedModel,
    *,
    feature_layer: int | None = None,
    keep_projector: bool = False,
) -> tuple[Any, Any]:
    """`swap_vision_tower` with the tower as it is: of ours, when `add_regions` is to read boxes with its readout."""
    projectors = (PROJECTOR, REGION_PROJECTOR) if family_of(model.config).regions else (PROJECTOR,)
    whole: Any = model
    language_model = whole.model.language_model
    if getattr(model.config, "quantization_config", None) is not None:
        raise UserError("the model is quantised; swap the tower of the unquantised checkpoint and quantise the result.")
    weight = next(language_model.parameters())
    device = torch.device("cpu") if weight.is_meta else weight.device
    tower = _rounded(tower, weight.dtype)
    nn.Module.to(tower, device)

    config: Any = copy.deepcopy(model.config)
    follow_in_config(config, tower.config, feature_layer)
    config.text_config = language_model.config
    config.dtype = weight.dtype
    with torch.device("meta"):  # a frame without memory: the parts put into it are the only copies
        new: Any = type(model)(config)
    adopt(new.model, whole.model, leave=(TOWER, *projectors))
    new.lm_head = whole.lm_head
    new.model.vision_tower = tower
    for name in projectors:
        if keep_projector:
            setattr(new.model, name, _same_width(name, whole.model, new))
        else:
            std = getattr(language_model.config, "initializer_range", 0.02)
            fresh_part(getattr(new.model, name), weight.dtype, device, std)
    new.generation_config = copy.deepcopy(whole.generation_config)
    return new.train(model.training), follow_in_processor(processor, config)


def adopt(new: nn.Module, old: nn.Module, leave: tuple[str, ...]) -> None:
    """Give `new` the modules and parameters that stand directly in `old`, but for those in `leave`."""
    for name, child in old.named_children():
        if name not in leave:
            setattr(new, name, child)
    for name, parameter in old.named_parameters(recurse=False):
        setattr(new, name, parameter)


def _rounded(tower: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Parameters in `dtype`. Not `tower.to(dtype)`: that rounds rotary frequencies too, which stay float32 when a
    checkpoint is opened."""
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.data = parameter.data.to(dtype)
    tower.config.dtype = dtype
    return tower


def _same_width(projector: str, old: Any, new: Any) -> nn.Module:
    kept = getattr(old, projector)
    wanted = {name: tensor.shape for name, tensor in getattr(new.model, projector).state_dict().items()}
    for name, tensor in kept.state_dict().items():
        if tensor.shape != wanted[name]:
            width = new.config.vision_config.hidden_size
            raise UserError(
                f"the projector cannot be kept: {projector}.{name} is {tuple(tensor.shape)} and a tower {width} wide "
                f"needs {tuple(wanted[name])}; leave keep_projector out and train a new one."
            )
    return kept
