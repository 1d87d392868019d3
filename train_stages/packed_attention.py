"""Attention in which samples that share a row do not see each other.

Kernels for samples of any length in one row exist for GPUs (flash attention's "varlen"). transformers hands them the
borders of the samples as `cu_seq_lens_q` and so on. Here the same keywords reach torch's own attention, on any device:
each sample is computed alone, so what lies between samples is neither masked nor computed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.utils.import_utils import is_flash_attn_2_available

from ..vision_towers.errors import UserError

PACKED_SDPA = "packed_sdpa"
_PROBE = (7, 5)  # tokens of the two samples that `refuse_leaks` packs
_WRONG = 0.05  # of the largest output: more than rounding does to a sample that is computed among others


def varlen_borders(lengths: list[int]) -> dict[str, torch.Tensor | int]:
    """Keyword arguments of a forward whose single row holds samples of these lengths, in tokens and all above 0.

    Returns:
        What flash attention's varlen kernels take: `cu_seq_lens_q` and `cu_seq_lens_k`, int32 `(samples + 1,)`, where
        samples begin in the row and where the last one ends; `max_length_q` and `max_length_k`, the longest sample as
        an int. And `position_ids`, int64 `(1, tokens)`, which begin again at 0 with every sample.
    """
    borders = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return {
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "cu_seq_lens_q": borders,
        "cu_seq_lens_k": borders,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
    }


@contextmanager
def packed_attention(
    language_model: PreTrainedModel, device: torch.device, dtype: torch.dtype | None = None
) -> Iterator[None]:
    """Within it, `language_model` keeps packed samples apart: by flash attention where that is in use or at hand and
    takes `dtype`, else by torch's attention, sample by sample. Calls without borders are answered as before.

    Args:
        device: that it runs on.
        dtype: that it computes in, such as autocast's; that of its weights when absent.
    Raises:
        UserError: its samples would see each other, because it does not take its attention from transformers, or mixes
            tokens elsewhere (a convolution, a state).
    """
    before = language_model.config._attn_implementation
    flash = flash_for(before, device, dtype or _weights(language_model).dtype)
    if not language_model._can_set_attn_implementation():
        raise UserError(
            f"a {language_model.config.model_type} computes attention in a way of its own, and packed samples would "
            "see each other; set data.batches=grouped."
        )
    language_model.set_attn_implementation(PACKED_SDPA)
    try:
        refuse_leaks(language_model)
        if flash is not None:
            language_model.set_attn_implementation(flash)
        yield
    finally:
        language_model.set_attn_implementation(before or "sdpa")


def flash_for(before: str | None, device: torch.device, dtype: torch.dtype) -> str | None:
    """The flash attention that packed samples get: the one that is set, or flash attention 2 on a GPU where it is
    installed; None where there is none, or its kernels do not take `dtype`."""
    if dtype not in (torch.bfloat16, torch.float16):
        return None
    if before is not None and "flash" in before:
        return before
    return "flash_attention_2" if device.type == "cuda" and is_flash_attn_2_available() else None


def _weights(language_model: PreTrainedModel) -> torch.Tensor:
    """Some of them, never quantized."""
    weight = language_model.get_input_embeddings().weight
    assert isinstance(weight, torch.Tensor)
    return weight


@torch.no_grad()
def refuse_leaks(language_model: PreTrainedModel) -> None:
    """Raise UserError when the second of two packed samples depends on the first, or is not what it is alone."""
    weight = _weights(language_model)
    was_training = language_model.training
    language_model.eval()
    try:
        generator = torch.Generator().manual_seed(0)
        width = weight.shape[1]
        first, other, second = (torch.randn(1, size, width, generator=generator) for size in (*_PROBE[:1], *_PROBE))
        packed = varlen_borders(list(_PROBE))
        outputs = [
            _hidden(language_model, torch.cat([neighbour, second], dim=1).to(weight), packed)[:, _PROBE[0] :]
            for neighbour in (first, other)
        ]
        alone = _hidden(language_model, second.to(weight), {})
    finally:
        language_model.train(was_training)
    largest = alone.abs().max()
    # The same numbers of tokens beside it give the same sums, in the same order: nothing but a leak can differ.
    leak = (outputs[0] - outputs[1]).abs().max() > torch.finfo(weight.dtype).eps * largest
    if leak or (outputs[0] - alone).abs().max() > _WRONG * largest:
        raise UserError(
            f"packed samples would see each other in a {language_model.config.model_type}; set data.batches=grouped."
        )


def _hidden(language_model: nn.Module, embeds: torch.Tensor, keywords: dict[str, Any]) -> torch.Tensor:
    moved = {name: value.to(embeds.device) if torch.is_tensor(value) else value for name, value in keywords.items()}
    return language_model(inputs_embeds=embeds, use_cache=False, **moved)[0].float()


@torch.compiler.disable  # the borders are numbers of this batch: compiled code would be compiled again for every batch
def _packed_sdpa(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    cu_seq_lens_q: torch.Tensor | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """query, key, value: `(1, heads, tokens, head width)`, and `(B, ...)` without borders."""
    if cu_seq_lens_q is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    lengths = cu_seq_lens_q.diff().tolist()
    parts = [
        sdpa_attention_forward(module, q, k, v, _band(q, sliding_window), **kwargs)[0]
        for q, k, v in zip(*(part.split(lengths, dim=2) for part in (query, key, value)), strict=True)
    ]
    return torch.cat(parts, dim=1), None


def _band(query: torch.Tensor, window: int | None) -> torch.Tensor | None:
    """What a layer that looks back `window` tokens sees of a sample; None where that is all that lies behind."""
    length = query.shape[2]
    if window is None or length <= window:
        return None
    place = torch.arange(length, device=query.device)
    back = place[:, None] - place[None]
    return ((back >= 0) & (back < window))[None, None]


def _packed_mask(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    """transformers asks for a mask over the whole row when positions begin again in it; the borders are enough."""
    if kwargs.get("attention_mask") is None and not kwargs.get("allow_is_causal_skip", True):
        return None
    return sdpa_mask(*args, **kwargs)


AttentionInterface.register(PACKED_SDPA, _packed_sdpa)
AttentionMaskInterface.register(PACKED_SDPA, _packed_mask)
