"""The forward pass of a native CLIP, MLCD or SigLIP in which patch tokens are merged on the way."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.mlcd.modeling_mlcd import apply_rotary_pos_emb_vision

from .errors import UserError
from .token_clusters import cluster_tokens


def run_reduced(
    tower: Any,
    pixel_values: Tensor,
    grid_hw: tuple[int, int],
    after: int,
    keep: float,
    hidden_states: bool | int | Sequence[int] | None,
    interpolate_pos_encoding: bool = False,
) -> BaseModelOutputWithPooling:
    """What `tower(pixel_values)` returns, with `round(keep P)` tokens instead of P from block `after` on.

    Args:
        tower: its blocks opened by `open_other_paths`. pixel_values: `(B, 3, H, W)`, `grid_hw` patches.
        after: blocks that run on all tokens. keep: in (0, 1].
        hidden_states: which to return; all (True), none, or some by their numbers. interpolate_pos_encoding: as in the
            towers that have a table of positions.
    Every output has all patches: each gets what its cluster has become. CLS is never merged. A cluster counts as one
    token in the attention, whatever its size (weighting it by its size is not in the paper, and flash kernels could
    not do it); in SigLIP's pooling head, which sees all patches again, it counts by its size.
    Raises UserError for a tower with adapters that need the grid.
    """
    if hasattr(tower.encoder.layers[0].self_attn, "convpass"):
        raise UserError("a Convpass reads the grid of patches, and merged tokens have none: set reduce_after to None.")
    rotary = hasattr(tower, "vision_rotary_embedding")
    options = {"interpolate_pos_encoding": True} if interpolate_pos_encoding else {}
    states = tower.embeddings(pixel_values, **options)
    if hasattr(tower, "pre_layrnorm"):
        states = tower.pre_layrnorm(states)
    layers, patches = tower.encoder.layers, grid_hw[0] * grid_hw[1]
    prefix = states.shape[1] - patches
    wanted = _wanted(hidden_states, len(layers) + 1)
    kept: list[Any] = [states if 0 in wanted else None]
    places = _places(grid_hw, states.device) if rotary else None
    angles = _angles(tower, states, places)
    clusters = None
    for number, layer in enumerate(layers):
        if number == after:
            # Normalised, as every block reads them: the states themselves grow from block to block.
            normed = F.layer_norm(states[:, prefix:], states.shape[-1:])
            clusters = cluster_tokens(normed, max(1, round(keep * patches)))
            states = torch.cat([states[:, :prefix], clusters.merge(states[:, prefix:])], dim=1)
            if places is not None:  # a cluster stands in the middle of its members
                angles = _angles(tower, states, clusters.merge(places.expand(len(states), -1, -1)))
        if angles is None:
            states = layer(states, None)
        elif clusters is None:
            states = layer(states, angles)
        else:
            states = layer(states, path=_rotary_block, angles=angles)
        kept.append(_whole(states, clusters, prefix) if number + 1 in wanted else None)
    last = _whole(states, clusters, prefix)
    if prefix:  # CLIP and MLCD pool CLS, SigLIP has a head or nothing
        pooled = tower.post_layernorm(last[:, 0])
    else:
        last = tower.post_layernorm(last)
        pooled = tower.head(last) if tower.use_head else None
    return BaseModelOutputWithPooling(
        last_hidden_state=last, pooler_output=pooled, hidden_states=tuple(kept) if wanted else None
    )


def _wanted(asked: bool | int | Sequence[int] | None, total: int) -> set[int]:
    if asked is None or isinstance(asked, bool):
        return set(range(total)) if asked else set()
    return {layer % total for layer in ([asked] if isinstance(asked, int) else asked)}


def _whole(states: Tensor, clusters, prefix: int) -> Tensor:
    """All patches again."""
    if clusters is None:
        return states
    return torch.cat([states[:, :prefix], clusters.unmerge(states[:, prefix:])], dim=1)


def _places(grid_hw: tuple[int, int], device: torch.device) -> Tensor:
    """`(P, 2)` float, row and column of each patch."""
    rows, columns = (torch.arange(side, device=device, dtype=torch.float32) for side in grid_hw)
    return torch.cartesian_prod(rows, columns)


def _angles(tower: Any, states: Tensor, places: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """MLCD's cosines and sines `(..., 1 + P, head_dim)` of CLS and of patches at `places (..., P, 2)`."""
    if places is None:
        return None
    cos, sin = tower.vision_rotary_embedding(states, places.reshape(-1, 2))
    of_class = torch.cat([tower.class_pos_emb, tower.class_pos_emb], dim=-1).expand(*places.shape[:-2], 1, -1)
    found = (of_class.cos(), cos), (of_class.sin(), sin)
    first, second = (torch.cat([own, rest.view(*places.shape[:-1], -1)], dim=-2) for own, rest in found)
    return first, second


def _rotary_block(layer: Any, states: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """MLCD's block with angles `(B, N, head_dim)` of each image's own: its attention takes only angles all share."""
    attention, normed = layer.self_attn, layer.layer_norm1(states)
    query, key, value = (
        project(normed).unflatten(-1, (attention.num_heads, attention.head_dim))
        for project in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    query, key = apply_rotary_pos_emb_vision(query, key, *angles)
    query, key, value = (heads.transpose(1, 2) for heads in (query, key, value))
    mixed = F.scaled_dot_product_attention(query, key, value, scale=attention.scale)
    states = states + attention.out_proj(mixed.transpose(1, 2).flatten(2))
    return states + layer.mlp(layer.layer_norm2(states))
