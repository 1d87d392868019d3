"""RICE: an MLCD ViT whose last layers also carry a region stream (RICE, Sec. 3.2 and Eq. 2).

The image stream is MLCD's, untouched: bit-equal with and without boxes. Beside it, each box has one query that starts
as a copy of the CLS token entering the first region layer and passes through the same layers with the same weights,
seeing only the patches of its box and itself:

    R = softmax(Q K^T / sqrt(d_k) + M) V,    M[l, t] = 0 if token t is inside region l, else -inf

There is no extra parameter, and a box over the whole image gives `pooler_output`. The paper does not say where the
query comes from, whether it passes through MLPs, or which rotary angle it has; this completion is ours.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import MLCDVisionModel
from transformers.modeling_outputs import BaseModelOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.mlcd.modeling_mlcd import (
    MLCDEncoder,
    MLCDEncoderLayer,
    MLCDRotaryEmbedding,
    MLCDVisionEmbeddings,
    apply_rotary_pos_emb_vision,
    eager_attention_forward,
)

from .describe import side_of
from .errors import UserError
from .outputs import TowerFeatures, TowerOutput
from .region_boxes import check_boxes, patch_grid, patches_in_boxes, valid_rows
from .rice_config import RiceVisionConfig

Angles = tuple[torch.Tensor, torch.Tensor]  # (cos, sin), each (1 + patches, head_dim); row 0 is the class token's


@dataclass
class RegionStream:
    """What travels beside the image stream through the region layers.

    `mask (B, 1, R, patches + R)` is additive: 0 on the patches of a box and on the query itself, a huge negative
    elsewhere. `states (B, R, hidden_size)` is None until the first region layer copies the CLS token into it.
    """

    mask: torch.Tensor
    states: torch.Tensor | None = None


class RiceRegionLayer(MLCDEncoderLayer):
    """An MLCD layer that can also take region states; without them it is exactly `MLCDEncoderLayer`."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: Angles,
        attention_mask: torch.Tensor | None = None,
        region_states: torch.Tensor | None = None,
        region_mask: torch.Tensor | None = None,
        run_image_stream: bool = True,
        **kwargs,
    ):
        if region_states is None:
            return super().forward(hidden_states, position_embeddings, attention_mask, **kwargs)
        regions = self._region_step(region_states, hidden_states, position_embeddings, region_mask)
        image = hidden_states
        if run_image_stream:
            image = super().forward(hidden_states, position_embeddings, attention_mask, **kwargs)
        return image, regions

    def _region_step(self, states: torch.Tensor, image: torch.Tensor, angles: Angles, mask: torch.Tensor | None):
        """One layer of the region stream: `states (B, R, D)` read the image `(B, 1 + P, D)` entering this layer."""
        normed = self.layer_norm1(states)
        states = states + self._region_attention(normed, self.layer_norm1(image[:, 1:]), angles, mask)
        return states + self.mlp(self.layer_norm2(states))

    def _region_attention(self, query: torch.Tensor, patches: torch.Tensor, angles: Angles, mask: torch.Tensor | None):
        attention = self.self_attn
        batch, regions, width = query.shape
        cos, sin = (angle[None].float() for angle in angles)

        def split_heads(x: torch.Tensor) -> torch.Tensor:
            return x.view(batch, x.shape[1], attention.num_heads, attention.head_dim)

        # The query sits where CLS sits: at the learned class angle. It is a key too, for itself alone (see the mask).
        q, own = apply_rotary_pos_emb_vision(
            split_heads(attention.q_proj(query)), split_heads(attention.k_proj(query)), cos[:, :1], sin[:, :1]
        )
        k = split_heads(attention.k_proj(patches))
        k, _ = apply_rotary_pos_emb_vision(k, k, cos[:, 1:], sin[:, 1:])
        keys = torch.cat([k, own], dim=1).transpose(1, 2)
        values = split_heads(torch.cat([attention.v_proj(patches), attention.v_proj(query)], dim=1)).transpose(1, 2)

        # Region masks are arbitrary, which flash kernels do not take: eager stays eager, everything else runs sdpa.
        implementation = "eager" if attention.config._attn_implementation == "eager" else "sdpa"
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        out, _ = attend(
            attention,
            q.transpose(1, 2).contiguous(),
            keys.contiguous(),
            values.contiguous(),
            None if mask is None else mask.to(q.dtype),
            dropout=attention.dropout if self.training else 0.0,
            scaling=attention.scale,
            is_causal=False,
        )
        return attention.out_proj(out.reshape(batch, regions, width))


class RiceEncoder(MLCDEncoder):
    """MLCD's encoder; its last `num_region_layers` layers take the region stream."""

    def __init__(self, config: RiceVisionConfig):
        nn.Module.__init__(self)
        self.config = config
        first = config.num_hidden_layers - config.num_region_layers
        self.layers = nn.ModuleList(
            MLCDEncoderLayer(config) if i < first else RiceRegionLayer(config) for i in range(config.num_hidden_layers)
        )
        self.gradient_checkpointing = False

    def forward(self, inputs_embeds, position_embeddings, attention_mask=None, region_stream=None, **kwargs):
        hidden = inputs_embeds
        for layer in self.layers:
            if region_stream is None or not isinstance(layer, RiceRegionLayer):
                hidden = layer(hidden, position_embeddings, attention_mask, **kwargs)
                continue
            hidden, region_stream.states = layer(
                hidden,
                position_embeddings,
                attention_mask,
                _query_or_cls(region_stream, hidden),
                region_stream.mask,
                **kwargs,
            )
        return BaseModelOutput(last_hidden_state=hidden)


class RiceVisionModel(MLCDVisionModel):
    """`MLCDVisionModel` that also answers with one embedding a box.

    Loads any `mlcd_vision_model` checkpoint, flat or with the older `vision_model.` prefix; `to_native` gives one back.
    """

    config: RiceVisionConfig
    config_class = RiceVisionConfig
    _no_split_modules = ["MLCDEncoderLayer", "RiceRegionLayer"]  # noqa: RUF012 - transformers' own declaration style

    def __init__(self, config: RiceVisionConfig):
        # Skips MLCDVisionModel.__init__, which would build an encoder only to throw it away; same parts, same names.
        super(MLCDVisionModel, self).__init__(config)
        self.embeddings = MLCDVisionEmbeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.encoder = RiceEncoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.vision_rotary_embedding = MLCDRotaryEmbedding(config)
        self.class_pos_emb = nn.Parameter(torch.randn(1, config.hidden_size // config.num_attention_heads // 2))
        self.post_init()

    @property
    def region_feature_layers(self) -> tuple[int, ...]:
        """`hidden_states` entries that `forward(features=...)` needs: the inputs of the region layers."""
        layers = self.config.num_hidden_layers
        return tuple(range(layers - self.config.num_region_layers, layers))

    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        boxes: torch.Tensor | None = None,
        region_counts: torch.Tensor | None = None,
        features: TowerFeatures | None = None,
        **kwargs,
    ):
        """Encode images and, when boxes are given, regions.

        Args:
            pixel_values: `(B, 3, H, W)`, normalised, H and W multiples of the patch size.
            boxes: `(B, R_max, 4)` float32, padded; xyxy in pixels of that `(H, W)` frame.
            region_counts: `(B,)` how many rows of `boxes` are real; all of them when absent.
            features: layer inputs of an earlier call instead of `pixel_values`; only regions are computed.
        Returns:
            `TowerOutput`; without boxes exactly what `MLCDVisionModel` returns.
        Raises:
            UserError: boxes of the wrong shape or in half precision, or `features` without boxes.
        """
        if features is not None:
            return self._from_features(features, boxes, region_counts)
        if boxes is None:
            return super().forward(pixel_values, **kwargs)
        if pixel_values is None:
            raise UserError("give pixel_values, or the features of an earlier call.")

        grid = patch_grid(pixel_values, side_of(self.config.patch_size))
        counts = check_boxes(boxes, region_counts, pixel_values.shape[0])
        stream = RegionStream(self._region_mask(boxes, grid))
        return_dict = kwargs.pop("return_dict", self.config.return_dict)
        kwargs |= {"region_stream": stream, "return_dict": True}
        native = super().forward(pixel_values, **kwargs)
        assert not isinstance(native, tuple)  # return_dict was set
        output = TowerOutput(**native, region_embeds=self._read_out(stream.states, counts, boxes.shape[1]))
        return output.to_tuple() if return_dict is False else output

    def _from_features(self, features: TowerFeatures, boxes, region_counts) -> TowerOutput:
        missing = [layer for layer in self.region_feature_layers if layer not in features.hidden]
        if boxes is None or missing:
            raise UserError(f"features need boxes and the hidden states {self.region_feature_layers}; got {missing=}.")
        counts = check_boxes(boxes, region_counts, features.hidden[self.region_feature_layers[0]].shape[0])
        stream = RegionStream(self._region_mask(boxes, features.grid_hw))
        angles = self._angles(features.grid_hw, boxes.device)
        for index in self.region_feature_layers:
            hidden = features.hidden[index]
            query = _query_or_cls(stream, hidden)
            _, stream.states = self.encoder.layers[index](
                hidden, angles, None, query, stream.mask, run_image_stream=False
            )
        return TowerOutput(region_embeds=self._read_out(stream.states, counts, boxes.shape[1]))

    def _region_mask(self, boxes: torch.Tensor, grid_hw: tuple[int, int]) -> torch.Tensor:
        if boxes.shape[1] == 0:  # attention kernels reject empty query axes: one dummy row, sliced off at the end
            boxes = boxes.new_zeros(boxes.shape[0], 1, 4)
        inside = patches_in_boxes(boxes, grid_hw, side_of(self.config.patch_size), self.config.region_mask_rule)
        itself = torch.eye(boxes.shape[1], dtype=torch.bool, device=boxes.device).expand(boxes.shape[0], -1, -1)
        visible = torch.cat([inside, itself], dim=-1)[:, None]
        lowest = torch.finfo(self.dtype).min
        return torch.zeros(visible.shape, dtype=self.dtype, device=boxes.device).masked_fill(~visible, lowest)

    def _read_out(self, states: torch.Tensor | None, counts: torch.Tensor, rows: int) -> torch.Tensor:
        assert states is not None  # there is at least one region layer
        embeds = self.post_layernorm(states)[:, :rows]
        return embeds * valid_rows(counts, rows)[..., None].to(embeds.dtype)

    def _angles(self, grid_hw: tuple[int, int], device: torch.device) -> Angles:
        """Rotary (cos, sin) of the class token and of every patch, in the order of the tokens."""
        rows, columns = grid_hw
        grid = torch.cartesian_prod(torch.arange(rows, device=device), torch.arange(columns, device=device))
        cos, sin = self.vision_rotary_embedding(grid, grid)
        class_angle = torch.cat([self.class_pos_emb, self.class_pos_emb], dim=-1)
        return torch.cat([class_angle.cos(), cos]), torch.cat([class_angle.sin(), sin])

    def to_native(self) -> MLCDVisionModel:
        """The same weights as a plain `MLCDVisionModel` (shares storage with this model)."""
        config = self.config.to_native()
        config.dtype, config._attn_implementation = self.dtype, self.config._attn_implementation
        with torch.device("meta"):
            native = MLCDVisionModel(config)
        on_tensors_of(self, native)
        # In float32, whatever this model was rounded to: so it is opened from a checkpoint, too.
        native.vision_rotary_embedding = MLCDRotaryEmbedding(config).to(self.device)
        return native


def on_tensors_of(given: nn.Module, frame: nn.Module) -> Any:
    """`frame`, a model that was built on the meta device, with the tensors of `given`, which has the same: neither is
    initialised nor copied."""
    frame.load_state_dict(given.state_dict(), assign=True)
    for name, buffer in given.named_buffers():  # some are in no state dict and would stay without memory
        owner, _, leaf = name.rpartition(".")
        setattr(frame.get_submodule(owner), leaf, buffer)
    return frame.train(given.training)


def _query_or_cls(stream: RegionStream, hidden: torch.Tensor) -> torch.Tensor:
    """The region states, or copies of the CLS token entering the first region layer."""
    return stream.states if stream.states is not None else hidden[:, :1].expand(-1, stream.mask.shape[2], -1)
