"""Keys and values of a prompt's beginning, computed once and continued by many prompts.

A causal model's keys and values at a position depend on what stands before it alone, so prompts that begin alike share
them to the bit of arithmetic. Positions are counted from each prompt's own start; where a row lies in memory does not
matter to full attention, and to sliding windows only the distances do: no row ever has a gap.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache

from .cache_argument import cache_argument

Layers = list[tuple[torch.Tensor, torch.Tensor]]
# Layers whose state is keys and values by position; others (linear attention, convolutions) cannot be cut.
_CUTTABLE = {"full_attention", "sliding_attention"}


@dataclass(frozen=True)
class KVRows:
    """Keys and values `(rows, heads, tokens, width)` of each layer, and how many tokens of each row are real (the
    first ones)."""

    layers: Layers
    lengths: list[int]


def can_share(text_config: Any) -> bool:
    """Whether a prefix of this language model's cache means what it says."""
    return set(getattr(text_config, "layer_types", None) or _CUTTABLE) <= _CUTTABLE


def run(language_model: nn.Module, embeds: torch.Tensor, before: Layers | None) -> tuple[torch.Tensor, Layers]:
    """One causal pass over `embeds (rows, tokens, width)` that follow `before`.

    Rows may end in padding: nothing real attends to what comes after it.

    Returns:
        The hidden states `(rows, tokens, width)`, and the layers of `before` and the new tokens.
    """
    # Without a config every layer keeps all of its tokens, those with a sliding window, too.
    cache = as_cache(before or [])
    start = cache.get_seq_length()
    positions = torch.arange(start, start + embeds.shape[1], device=embeds.device)[None]
    output = language_model(
        inputs_embeds=embeds, position_ids=positions, use_cache=True, return_dict=True, **cache_argument(cache)
    )
    return output.last_hidden_state, layers_of(cache)


def as_cache(layers: Layers) -> DynamicCache:
    """A cache that holds these tokens."""
    cache = DynamicCache()
    for index, (keys, values) in enumerate(layers):
        cache.update(keys, values, index)
    return cache


def layers_of(cache: DynamicCache) -> Layers:
    """What a cache holds."""
    return [(layer.keys, layer.values) for layer in cache.layers]  # pyright: ignore - filled by now


def take(layers: Layers, row: int, tokens: int) -> Layers:
    """The first tokens of one row, on their own (a view would keep all rows alive)."""
    return [tuple(part[row : row + 1, :, :tokens].clone() for part in layer) for layer in layers]  # pyright: ignore


def stack(rows: Sequence[Layers], tokens: int) -> Layers:
    """The first tokens of several single rows, one below the other."""
    return [
        tuple(torch.cat([row[layer][part][:, :, :tokens] for row in rows]) for part in (0, 1))
        for layer in range(len(rows[0]))
    ]  # pyright: ignore[reportReturnType]


def align_right(groups: Sequence[KVRows]) -> tuple[DynamicCache, torch.Tensor]:
    """All rows of all groups in one cache, each ending at its right edge, padding on the left.

    Returns:
        The cache, and the mask `(rows, longest)` of what is real: the state that a left-padded prompt leaves behind.
    """
    longest = max(max(group.lengths) for group in groups)
    device = groups[0].layers[0][0].device
    lengths = torch.tensor([length for group in groups for length in group.lengths], device=device)
    layers: Layers = []
    for index in range(len(groups[0].layers)):
        keys, values = (
            torch.cat([_shift(group.layers[index][part], group.lengths, longest) for group in groups])
            for part in (0, 1)
        )
        layers.append((keys, values))
        for group in groups:  # half of the memory peak
            group.layers[index] = (keys[:0], values[:0])
    mask = torch.arange(longest, device=device)[None] >= longest - lengths[:, None]
    return as_cache(layers), mask.long()


def _shift(tensor: torch.Tensor, lengths: Sequence[int], longest: int) -> torch.Tensor:
    if all(length == longest for length in lengths):
        return tensor[:, :, :longest]
    shifted = tensor.new_zeros(tensor.shape[0], tensor.shape[1], longest, tensor.shape[3])
    for row, length in enumerate(lengths):
        shifted[row, :, longest - length :] = tensor[row, :, :length]
    return shifted
