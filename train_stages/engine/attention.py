"""How attention is computed while a stage trains."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode


def attention_kernels(device: torch.device, precision: str) -> AbstractContextManager:
    """A context for training: torch's choice, except in bf16 on a CPU, where attention alone is in fp32."""
    if device.type == "cpu" and precision == "bf16":
        return _Fp32Attention()
    return nullcontext()


@contextmanager
def without_caches(model: nn.Module) -> Iterator[None]:
    """Within it, no part of `model` keeps keys and values for a generation that training never does.

    Trainer switches `use_cache` off in the model's own configuration and not in that of a language model inside it;
    what was set before is set again, because the configuration is about to be saved.
    """
    found: list[Any] = [getattr(part, "config", None) for part in model.modules()]
    configs: dict[int, Any] = {id(config): config for config in found if getattr(config, "use_cache", False)}
    for config in configs.values():
        config.use_cache = False
    try:
        yield
    finally:
        for config in configs.values():
            config.use_cache = True


class _Fp32Attention(TorchFunctionMode):
    """bf16 queries, keys and values go through torch's attention as fp32.

    Its CPU flash kernel takes several times as long backward in bf16 as in fp32, and plain products, the alternative,
    write out a score for every pair of tokens.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            return _in_fp32(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _in_fp32(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    *rest: Any,
    **named: Any,
) -> torch.Tensor:
    if attn_mask is not None and attn_mask.is_floating_point():
        attn_mask = attn_mask.float()
    with torch.autocast("cpu", enabled=False):  # it would cast them back
        out = F.scaled_dot_product_attention(query.float(), key.float(), value.float(), attn_mask, *rest, **named)
    return out.to(query.dtype)
