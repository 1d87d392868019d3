"""Weights of the language model in 8 or 4 bits (bitsandbytes)."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, Literal, get_args

import torch

from ..vision_towers import UserError

Quant = Literal["none", "int8", "nf4"]
# Rounding a tower or a projector costs more than it saves, and the head shares the embeddings of many models.
# transformers matches these from the beginning of a module's name: "vision_tower" alone would spare nothing.
NEVER = ["model.vision_tower", "model.multi_modal_projector", "model.region_projector", "lm_head"]


def quantization(quant: str, compute: torch.dtype) -> Any | None:
    """What `from_pretrained` takes as `quantization_config`; None for "none".

    Args:
        quant: "none", "int8" (LLM.int8(), Dettmers et al. 2022) or "nf4" (QLoRA's 4-bit type with double quantization,
            Dettmers et al. 2023, arXiv 2305.14314).
        compute: dtype of the products with 4-bit weights.
    Raises:
        UserError: another word, or bitsandbytes is not installed.
    """
    if quant not in get_args(Quant):
        raise UserError(f"quant must be {', '.join(get_args(Quant))}; got {quant!r}.")
    if quant == "none":
        return None
    if find_spec("bitsandbytes") is None:
        raise UserError(f"{quant} weights need bitsandbytes: pip install 'regiontower[quant]'.")
    from transformers import BitsAndBytesConfig

    if quant == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=NEVER)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
        llm_int8_skip_modules=NEVER,
    )


def check_odd_layers(model: torch.nn.Module) -> None:
    """Layers of 4-bit weights that bitsandbytes (0.50) cannot use as they are on a CPU.

    Its kernel reads wrong scales where a row is not made of whole blocks: an error, since the answers would be noise.
    And with AVX512-BF16 it packs weights anew at the first answer and stops at outputs that are no multiple of 32
    (`_convert_weight_packed_for_cpu` in bitsandbytes/functional.py): such a layer is not packed.

    Raises:
        UserError: a layer has a number of inputs that is no multiple of the block that shares a scale.
    """
    layers: list[tuple[str, Any]] = list(model.named_modules())
    for name, module in layers:
        if not hasattr(module, "support_avx512bf16_for_cpu") or module.weight.device.type != "cpu":
            continue
        block = module.weight.blocksize
        if module.in_features % block:
            raise UserError(
                f"nf4 needs layers with a multiple of {block} inputs on a CPU, and {name} has {module.in_features}; "
                "use int8, or a GPU."
            )
        module.support_avx512bf16_for_cpu &= module.out_features % 32 == 0


def ready_to_train(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Products with 4-bit weights are computed in `dtype`, and the weights keep the layout that a backward pass reads
    (an evaluation between two steps would pack them for answers alone)."""
    layers: list[Any] = list(model.modules())
    for module in layers:
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.compute_dtype = dtype
            module.support_avx512bf16_for_cpu = False
