"""UMG-CLIP's tower: dense features of a CLIP or SigLIP in the space of its texts, and regions as their means.

UMG-CLIP (Shi et al., arXiv 2401.06397) says that regions are matched with texts, and not how they are pooled. These are
the ways of its relatives, without a parameter of their own:

- "value" (MaskCLIP; CLIPSelf, FineCLIP, FG-CLIP 1), for CLIP and MLCD: the last block without its attention weights.
  With h the block's input, y = h + OutProj(V(LN1(h))), z = y + MLP(LN2(y)), and the tower's LN_post(z).
- "map" (FG-CLIP 2), for SigLIP: its attention-pooling head with every patch as a query instead of the learned probe.
"""

from typing import Any, Literal, Self

import torch
from huggingface_hub.dataclasses import strict
from transformers import PreTrainedModel

from .errors import UserError
from .roi_pool import roi_mean
from .wrapped_model import WrappedVisionConfig, WrappedVisionModel

POOLINGS = ("value", "map")


@strict
class UmgClipVisionConfig(WrappedVisionConfig):
    """`WrappedVisionConfig` plus how dense features are made.

    Args:
        pooling: "value" or "map".
        region_layer: "value" applies the block that comes after this hidden state (-2: the last block), "map" applies
            the head to it (-1).
        roi_size: RoIAlign output is `roi_size x roi_size`, averaged; the relatives take 1.
    """

    model_type = "umg_clip_vision_model"

    pooling: str = "value"
    region_layer: int = -2
    roi_size: int = 1

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.pooling not in POOLINGS:
            raise UserError(f"pooling must be one of {', '.join(POOLINGS)}, got {self.pooling!r}.")
        if self.roi_size < 1:
            raise UserError(f"roi_size must be at least 1, got {self.roi_size}.")
        if self.pooling == "value" and self.region_layer in (-1, self.num_hidden_layers):
            raise UserError("pooling 'value' applies the block after region_layer, and after the last there is none.")


class UmgClipVisionModel(WrappedVisionModel):
    """A native CLIP, MLCD or SigLIP whose regions are means of dense features."""

    config: UmgClipVisionConfig
    config_class = UmgClipVisionConfig
    base_model_prefix = "umg_clip"

    def __init__(self, config: UmgClipVisionConfig):
        super().__init__(config)
        _check(self.tower, config.pooling)
        self.post_init()

    @classmethod
    def from_native(cls, tower: PreTrainedModel, **region_fields) -> Self:
        """As `WrappedVisionModel.from_native`; without `pooling`, "map" for a tower with an attention-pooling head."""
        pooling: Literal["value", "map"] = "map" if _has_head(tower) else "value"
        pooling = region_fields.setdefault("pooling", pooling)
        region_fields.setdefault("region_layer", -1 if pooling == "map" else -2)
        return super().from_native(tower, **region_fields)

    def dense_features(self, tokens: torch.Tensor) -> torch.Tensor:
        """Hidden state `region_layer (B, prefix + P, D)` to features `(B, prefix + P, D)` in the space that the tower's
        pooled output is in: each token by itself on the value path, all of them together in the head."""
        tower: Any = self.tower
        if self.config.pooling == "map":
            head, states = tower.head, tower.post_layernorm(tokens)
            mixed = head.attention(states, states, states, need_weights=False)[0]
            return mixed + head.mlp(head.layernorm(mixed))
        block = tower.encoder.layers[self.region_feature_layers[0]]
        attention = block.self_attn
        # The modules are called, never their weights used: adapters of peft sit on them.
        states = tokens + attention.out_proj(attention.v_proj(block.layer_norm1(tokens)))
        return tower.post_layernorm(states + block.mlp(block.layer_norm2(states)))

    def read_regions(
        self, tokens: torch.Tensor, grid_hw: tuple[int, int], input_hw: tuple[int, int], boxes: torch.Tensor
    ) -> torch.Tensor:
        patches = self.dense_features(tokens[:, -grid_hw[0] * grid_hw[1] :])
        return roi_mean(patches, grid_hw, boxes, self.spec.patch_size, self.config.roi_size)


def _has_head(tower: Any) -> bool:
    return getattr(tower, "head", None) is not None and hasattr(tower.head, "probe")


def _check(tower: Any, pooling: str) -> None:
    """Raises UserError when the tower lacks the parts that `pooling` uses."""
    if pooling == "map" and not _has_head(tower):
        raise UserError(
            f"pooling 'map' needs a tower with an attention-pooling head; {tower.config.model_type} has none."
        )
    layers = getattr(getattr(tower, "encoder", None), "layers", None)
    if pooling == "value" and (
        not layers or not hasattr(layers[-1], "layer_norm1") or not hasattr(tower, "post_layernorm")
    ):
        raise UserError(f"pooling 'value' is for CLIP and MLCD towers, and this is a {tower.config.model_type}.")
