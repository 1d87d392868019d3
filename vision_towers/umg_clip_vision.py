"""UMG-CLIP's tower: dense features of a CLIP or SigLIP in the space of its texts, and regions as their means.

UMG-CLIP (Shi et al., arXiv 2401.06397) says that regions are matched with texts, and not how they are pooled. These are
the ways of its relatives, without a parameter of their own:

- "value" (MaskCLIP; CLIPSelf, FineCLIP, FG-CLIP 1), for CLIP and MLCD: the last block without its attention weights.
  With h the block's input, y = h + OutProj(V(LN1(h))), z = y + MLP(LN2(y)), and the tower's LN_post(z).
- "map" (FG-CLIP 2), for SigLIP: its attention-pooling head with every patch as a query instead of the learned probe.
"""

from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from huggingface_hub.dataclasses import strict
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .convpass import convpass_beside
from .errors import UserError
from .other_paths import open_other_paths
from .outputs import TowerFeatures, TowerOutput
from .reduced_vit import run_reduced
from .region_boxes import patch_grid
from .roi_pool import roi_mean
from .wrapped_model import WrappedVisionConfig, WrappedVisionModel, with_layer

POOLINGS = ("value", "map")


@strict
class UmgClipVisionConfig(WrappedVisionConfig):
    """`WrappedVisionConfig` plus how dense features are made.

    Args:
        pooling: "value" or "map".
        region_layer: "value" applies the block that comes after this hidden state (-2: the last block), "map" applies
            the head to it (-1).
        roi_size: RoIAlign output is `roi_size x roi_size`, averaged; the relatives take 1.
        reduce_after: blocks after which patch tokens are merged into clusters (`cluster_tokens`), and after the last
            block copied back; None: never. For speed, in training above all: a tower may be opened with another value.
        reduce_to: share of the tokens that is left.
    """

    model_type = "umg_clip_vision_model"

    pooling: str = "value"
    region_layer: int = -2
    roi_size: int = 1
    reduce_after: int | None = None
    reduce_to: float = 0.5

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.pooling not in POOLINGS:
            raise UserError(f"pooling must be one of {', '.join(POOLINGS)}, got {self.pooling!r}.")
        if self.roi_size < 1:
            raise UserError(f"roi_size must be at least 1, got {self.roi_size}.")
        if self.pooling == "value" and self.region_layer in (-1, self.num_hidden_layers):
            raise UserError("pooling 'value' applies the block after region_layer, and after the last there is none.")
        if self.reduce_after is not None and not 1 <= self.reduce_after < self.num_hidden_layers:
            raise UserError(
                f"reduce_after must be 1 to {self.num_hidden_layers - 1}, blocks before the last one, "
                f"got {self.reduce_after}."
            )
        if not 0.0 < self.reduce_to <= 1.0:
            raise UserError(f"reduce_to must be in (0, 1], got {self.reduce_to}.")


@dataclass
class UmgClipVisionOutput(TowerOutput):
    """`TowerOutput` plus `dense_features (B, rows, columns, hidden_size)`, not normalised, of every patch."""

    dense_features: torch.Tensor | None = None


class UmgClipVisionModel(WrappedVisionModel):
    """A native CLIP, MLCD or SigLIP whose regions are means of dense features."""

    config: UmgClipVisionConfig
    config_class = UmgClipVisionConfig
    base_model_prefix = "umg_clip"

    def __init__(self, config: UmgClipVisionConfig):
        super().__init__(config)
        _check(self.tower, config.pooling)
        _open(self.tower)
        self.post_init()

    @classmethod
    def from_native(cls, tower: PreTrainedModel, **region_fields) -> Self:
        """As `WrappedVisionModel.from_native`; without `pooling`, "map" for a tower with an attention-pooling head."""
        pooling: Literal["value", "map"] = "map" if _has_head(tower) else "value"
        pooling = region_fields.setdefault("pooling", pooling)
        region_fields.setdefault("region_layer", -1 if pooling == "map" else -2)
        return super().from_native(tower, **region_fields)

    def new_readout(self, device: torch.device, dtype: torch.dtype) -> None:
        _open(self.tower)  # there is nothing to learn, and the tower has just been put in

    def run_native(
        self, pixel_values: torch.Tensor, hidden_states: bool | int | list[int] | None, **kwargs
    ) -> BaseModelOutputWithPooling:
        config = self.config
        if config.reduce_after is None:
            return super().run_native(pixel_values, hidden_states, **kwargs)
        if kwargs.pop("output_attentions", False):
            raise UserError("a tower that merges tokens has no attention between patches; set reduce_after to None.")
        grid = patch_grid(pixel_values, self.spec.patch_size)
        return run_reduced(
            self.tower, pixel_values, grid, config.reduce_after, config.reduce_to, hidden_states, **kwargs
        )

    def dense_features(self, tokens: torch.Tensor) -> torch.Tensor:
        """Hidden state `region_layer (B, prefix + P, D)` to features `(B, prefix + P, D)` in the space that the tower's
        pooled output is in: each token by itself on the value path, all of them together in the head."""
        tower: Any = self.tower
        if self.config.pooling == "map":
            return tower.head(tower.post_layernorm(tokens), path=_every_token)
        return tower.post_layernorm(tower.encoder.layers[self.region_feature_layers[0]](tokens, path=_value_path))

    def read_regions(
        self, tokens: torch.Tensor, grid_hw: tuple[int, int], input_hw: tuple[int, int], boxes: torch.Tensor
    ) -> torch.Tensor:
        patches = self.dense_features(tokens)[:, -grid_hw[0] * grid_hw[1] :]
        return self._roi_mean(patches, grid_hw, input_hw, boxes)

    def _roi_mean(self, patches, grid_hw, input_hw, boxes) -> torch.Tensor:
        return roi_mean(patches, grid_hw, boxes, self.spec.patch_size, self.config.roi_size)

    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        boxes: torch.Tensor | None = None,
        region_counts: torch.Tensor | None = None,
        features: TowerFeatures | None = None,
        output_dense_features: bool = False,
        **kwargs,
    ):
        """As `WrappedVisionModel.forward`; with `output_dense_features`, which needs `pixel_values`, also the features
        of all patches, computed once for them and for the boxes. Returns `UmgClipVisionOutput` then."""
        if not output_dense_features:
            return super().forward(pixel_values, boxes, region_counts, features, **kwargs)
        if pixel_values is None:
            raise UserError("dense features are made from pixel_values.")
        if kwargs.pop("return_dict", True) is False:
            raise UserError("dense features are answered by name: leave return_dict on.")
        layer = self.region_feature_layers[0]
        asked = kwargs.pop("output_hidden_states", self.config.output_hidden_states)
        native = super().forward(pixel_values, output_hidden_states=with_layer(asked, layer), **kwargs)
        assert isinstance(native, TowerOutput)
        output = UmgClipVisionOutput(**native)
        assert output.hidden_states is not None
        grid = patch_grid(pixel_values, self.spec.patch_size)
        patches = self.dense_features(output.hidden_states[layer])[:, -grid[0] * grid[1] :]
        output.dense_features = patches.unflatten(1, grid)
        if boxes is not None:
            input_hw = (pixel_values.shape[-2], pixel_values.shape[-1])
            output.region_embeds = self._checked(patches, grid, input_hw, boxes, region_counts, self._roi_mean)
        if not asked:
            output.hidden_states = None
        return output


def _value_path(block: Any, tokens: torch.Tensor) -> torch.Tensor:
    """A block without its attention weights."""
    attention, normed = block.self_attn, block.layer_norm1(tokens)
    # The modules are called, never their weights used: adapters of peft sit on them.
    states = tokens + attention.out_proj(attention.v_proj(normed)) + convpass_beside(attention, normed)
    return states + block.mlp(block.layer_norm2(states))


def _every_token(head: Any, states: torch.Tensor) -> torch.Tensor:
    """The pooling head with each token as its query."""
    mixed = head.attention(states, states, states, need_weights=False)[0]
    return mixed + head.mlp(head.layernorm(mixed))


def _open(tower: Any) -> None:
    open_other_paths([*tower.encoder.layers, *([tower.head] if _has_head(tower) else [])])


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
