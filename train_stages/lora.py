"""LoRA, QLoRA and DoRA: which layers get an adapter, and what of the model trains then."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import nn

from ..mllm.adapters import inject_adapter
from ..vision_towers.errors import UserError

# Part that can be adapted -> where its layers stand. The prefix is what keeps an adapter of the language model out of
# the tower, whose layers have the same short names (`q_proj`).
PLACES = {"language_model": "model.language_model", "tower": "model.vision_tower"}


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class LoraRecipe:
    """The `lora` block of `instruct`. The adapted parts are frozen, and their rates in `lr` are those of the adapters.

    rank, alpha, dropout: as in LoRA (Hu et al. 2021, arXiv 2106.09685); the adapter's output is scaled by alpha / rank.
    on: parts that get adapters. modules: short names of linear layers; all of the part when empty. dora: DoRA (Liu et
    al. 2024, arXiv 2402.09353), which trains the size of each weight's rows, too.
    """

    rank: Annotated[int, Field(gt=0)] = 16
    alpha: Annotated[float, Field(gt=0)] = 32.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    on: tuple[Literal["language_model", "tower"], ...] = ("language_model",)
    modules: tuple[str, ...] = ()
    dora: bool = False

    def __post_init__(self) -> None:
        if not self.on or len(set(self.on)) != len(self.on):
            raise ValueError("on names language_model, tower or both, each once")


def add_lora(model: nn.Module, lora: LoraRecipe) -> list[str]:
    """Put fresh adapters into `model`, in place; the first outputs are those of the model without them.

    Returns:
        The adapted layers.
    Raises:
        UserError: a part has no layer of such a name.
    """
    from peft import LoraConfig

    layers = [name for part in lora.on for name in linear_layers(model, PLACES[part], lora.modules)]
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # pyright: ignore[reportArgumentType] - it divides, whatever its annotation says
        lora_dropout=lora.dropout,
        target_modules=exact_pattern(layers),
        use_dora=lora.dora,
        bias="none",
    )
    inject_adapter(model, config)
    return layers


def linear_layers(model: nn.Module, place: str, modules: Iterable[str] = ()) -> list[str]:
    """Full names of the linear layers below `place`, of the short names `modules` alone where there are any.

    Layers inside torch's own `MultiheadAttention` are left out: it reads their weights without calling them.

    Raises:
        UserError: a short name that no layer has.
    """
    everything: dict[str, Any] = dict(model.named_modules())
    found = [
        name
        for name, module in everything.items()
        if name.startswith(place + ".")
        and isinstance(module, nn.Linear)
        and not isinstance(everything[name.rpartition(".")[0]], nn.MultiheadAttention)
    ]
    wanted = set(modules)
    there = {name.rpartition(".")[2] for name in found}
    if absent := sorted(wanted - there):
        raise UserError(f"lora.modules names {', '.join(absent)}; {place} has {', '.join(sorted(there))}.")
    return [name for name in found if not wanted or name.rpartition(".")[2] in wanted]


def exact_pattern(layers: Iterable[str]) -> str:
    """A regular expression, for peft to match whole names with, that fits these layers in whatever block they stand."""
    kinds = dict.fromkeys(re.sub(r"(?<=\\\.)\d+(?=\\\.)", r"\\d+", re.escape(name)) for name in layers)
    return "|".join(kinds)
