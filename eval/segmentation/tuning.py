"""A few parameters that tune a frozen tower: LoRA, or Convpass.

UMG-CLIP (arXiv 2401.06397) tunes with the backbone frozen; with which modules and sizes is not known to us.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ...vision_towers import UmgClipVisionModel, UserError, add_convpass
from ...vision_towers.convpass import Convpass

Tuning = Literal["none", "convpass", "lora"]
TUNINGS: tuple[str, ...] = get_args(Tuning)
ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")
MLP = ("fc1", "fc2")


def tune(tower: UmgClipVisionModel, tuning: Tuning, lora_rank: int = 16, bottleneck: int = 8) -> None:
    """Freeze the tower, and put adapters into it, in place, that change nothing as long as they have not learned.

    Args:
        tuning: "none", "convpass" (`add_convpass`, with `bottleneck`) or "lora": of peft, rank `lora_rank` and alpha
            twice that, beside every linear map of the blocks that dense features go through.
    Raises:
        UserError: a tower without blocks that the adapters fit, or with adapters in them.
    """
    if any(isinstance(module, BaseTunerLayer | Convpass) for module in tower.modules()):
        raise UserError("this tower has been tuned already; open it anew.")
    tower.requires_grad_(False)
    if tuning == "convpass":
        add_convpass(tower.to_native(), bottleneck)
    elif tuning == "lora":
        names = linear_maps(tower)
        if not names:
            raise UserError(f"LoRA is for a native CLIP, SigLIP or MLCD, and this is a {tower.spec.region_readout}.")
        native: Any = tower.to_native()
        inject_adapter_in_model(LoraConfig(r=lora_rank, lora_alpha=2 * lora_rank, target_modules=names), native)


def linear_maps(tower: UmgClipVisionModel) -> list[str]:
    """Names, in the native tower, of the linear maps of its blocks that dense features depend on.

    On the value path the last block's queries and keys are not used, and no gradient would reach an adapter there. The
    pooling head of a SigLIP is left alone: its attention reads the weights themselves, past any adapter.
    """
    native: Any = tower.to_native()
    last = tower.region_feature_layers[0]
    on_value_path = tower.config.pooling == "value"
    found = []
    for number, block in enumerate(native.encoder.layers[: last + on_value_path]):
        unused = ("q_proj", "k_proj") if on_value_path and number == last else ()
        found += [
            f"encoder.layers.{number}.{name}"
            for name, module in block.named_modules()
            if isinstance(module, nn.Linear) and name.split(".")[-1] in {*ATTENTION, *MLP} - {*unused}
        ]
    return found
