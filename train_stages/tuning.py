"""What of a RegionLlava trains, how fast, and how the result is written: whole, or as an adapter beside its base."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import nn

from ..mllm.adapters import write_adapter
from ..mllm.load import resolve_device
from ..mllm.quantize import Quant
from ..vision_towers.errors import UserError
from .engine import Part
from .lora import LoraRecipe

PARTS = {
    "tower": ("model.vision_tower",),
    "projector": ("model.multi_modal_projector", "model.image_newline"),
    "region_projector": ("model.region_projector",),
    "language_model": ("model.language_model", "lm_head"),
}
Decay = Annotated[float, Field(gt=0, le=1)]


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class LayerDecay:
    """What a part's learning rate is multiplied by from one block to the one before it; 1 is one rate for all."""

    tower: Decay = 1.0
    language_model: Decay = 1.0


def tuned_parts(
    model: nn.Module, rates: Mapping[str, float], decay: LayerDecay, lora: LoraRecipe | None = None
) -> list[Part]:
    """The parts of `model` for the engine.

    Args:
        model: with its adapters, if `lora` is given.
        rates: peak learning rate of each part; for an adapted part that of its adapters.
    Raises:
        UserError: adapters that would not train.
    """
    there = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    adapted = lora.on if lora is not None else ()
    parts = []
    for name, prefixes in PARTS.items():
        held = tuple(p for p in prefixes if any(n == p or n.startswith(p + ".") for n in there))
        factor = getattr(decay, name, 1.0)
        if name not in adapted:
            parts.append(Part(name, held, rates[name], layer_decay=factor))
        elif not rates[name]:
            raise UserError(f"lora.on names {name} and lr.{name} is 0: its adapters would not train.")
        else:
            parts.append(Part(name, held, 0.0, adapters=False))
            parts.append(Part(f"{name}.lora", held[:1], rates[name], adapters=True, layer_decay=factor))
    return parts


def check_quant(quant: Quant, rates: Mapping[str, float], lora: LoraRecipe | None) -> None:
    """Raise `UserError` when quantized weights would have to train."""
    if quant != "none" and rates["language_model"] and (lora is None or "language_model" not in lora.on):
        raise UserError(
            f"model.quant is {quant}, and weights in so few bits cannot train: add a lora block, or set "
            "lr.language_model to 0."
        )
    if quant == "int8" and lora is not None and lora.dora:
        raise UserError("lora.dora does not work on int8 weights; set model.quant to nf4 or none.")


def save_tuned(model: Any, processor: Any, folder: Path, base: str | None) -> None:
    """The model and its processor as `load_mllm` opens them.

    base: of an adapter; None writes the whole model.
    """
    if base is None:
        model.save_pretrained(folder)
    else:
        write_adapter(model, folder, base, _trained_whole(model))
    processor.save_pretrained(folder)


def _trained_whole(model: nn.Module) -> list[str]:
    """The prefixes whose own parameters have trained."""
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad and ".lora_" not in name]
    prefixes = [prefix for held in PARTS.values() for prefix in held]
    return [prefix for prefix in prefixes if any(n == prefix or n.startswith(prefix + ".") for n in trained)]


def local_device(device: str) -> str:
    """The device of this process, by torchrun's LOCAL_RANK where there are several GPUs."""
    found = resolve_device(device)
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if found == "cuda" else found


def trainability(rates: Mapping[str, float], decay: LayerDecay, lora: LoraRecipe | None = None) -> dict[str, str]:
    """What a recipe does to each part, in a few words: "frozen", "2e-05", "LoRA 0.0002", "2e-06, x 0.8 a layer"."""
    words = {}
    for name in PARTS:
        adapted = lora is not None and name in lora.on
        kind = ("DoRA " if lora is not None and lora.dora else "LoRA ") if adapted else ""
        factor = getattr(decay, name, 1.0)
        words[name] = f"{kind}{rates[name]:g}" + (f", x {factor:g} a layer" if factor != 1 else "")
        if not rates[name]:
            words[name] = "frozen"
    return words
