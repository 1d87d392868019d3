"""How much a batch of `align` or `instruct` asks of the machine: tokens, and operations in matrix products."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..vision_towers import describe_tower
from .conversation_ids import IGNORED
from .engine import Part, Work

_FORWARD, _WITH_GRADIENTS, _TRAINED = 2, 4, 6  # operations for each weight and token: + those for inputs, + for weights


class MllmWork:
    """Counts what a batch needs at least: padding and what is computed again for checkpointing are not in it.

    For each token and weight of a linear layer 2 operations forward, 2 more where gradients pass through to earlier
    parts, 2 more where the weight trains (Kaplan et al. 2020, arXiv 2001.08361, Sec. 2.1). For attention of the
    language model 4 forward and 8 backward for each pair of tokens and dimension, halved by the causal mask. Regions
    and attention inside the tower are left out: an estimate.
    """

    def __init__(self, model: Any, parts: Sequence[Part], pad_token_id: int | None) -> None:
        self._pad = pad_token_id
        trains = {part.name.partition(".")[0] for part in parts if part.lr and not part.adapters}
        tower, text = model.model.vision_tower, model.config.text_config
        spec = describe_tower(tower.config)
        self._patch = spec.patch_size
        self._per_patch = _weights(tower) * (_TRAINED if "tower" in trains else _FORWARD)
        # A tower that is adapted has gradients passing through it, and hardly any weights that train.
        if any(part.name == "tower.lora" for part in parts):
            self._per_patch = _weights(tower) * _WITH_GRADIENTS
        kind = _TRAINED if "language_model" in trains else _WITH_GRADIENTS
        self._per_token = _weights(model.model.language_model) * kind
        self._per_learned = _weights(model.lm_head) * kind
        self._per_image_token = _weights(model.model.multi_modal_projector) * _TRAINED
        self._image_token = model.config.image_token_id
        heads = text.num_attention_heads
        width = heads * (getattr(text, "head_dim", None) or text.hidden_size // heads)
        self._per_pair = 6 * width * text.num_hidden_layers

    def __call__(self, batch: Mapping[str, Any]) -> Work:
        ids = batch["input_ids"]
        borders = batch.get("cu_seq_lens_q")  # of samples that share a row
        lengths = self._lengths(ids) if borders is None else borders.diff().double()
        tokens = lengths.sum()
        flops = tokens * self._per_token + lengths.square().sum() * self._per_pair
        flops = flops + (ids == self._image_token).sum() * self._per_image_token
        labels = batch.get("labels")  # the head runs where something is learned
        flops = flops + (tokens if labels is None else (labels[:, 1:] != IGNORED).sum()) * self._per_learned
        pixels = batch.get("pixel_values")
        if pixels is not None:
            flops = flops + pixels.numel() // pixels.shape[-3] // self._patch**2 * self._per_patch
        return Work(tokens, flops)

    def _lengths(self, ids: torch.Tensor) -> torch.Tensor:
        """Tokens of each row before its padding; where padding is the token that ends a turn, others of it count."""
        if self._pad is None:
            return torch.full((len(ids),), ids.shape[1], dtype=torch.float64, device=ids.device)
        places = torch.arange(1, ids.shape[1] + 1, device=ids.device)
        return ((ids != self._pad) * places).amax(1).double()


def _weights(module: nn.Module) -> int:
    """Entries of the linear layers, also of those that are kept in fewer bits."""
    return sum(layer.in_features * layer.out_features for layer in module.modules() if isinstance(layer, nn.Linear))
