"""Any native Hugging Face ViT as the image stream of a region tower; how regions are read is the subclass's.

The image stream is the native tower's, except that register tokens are left out: LLaVA drops token 0 at most, so
registers would reach the language model as if they were patches.
"""

from abc import ABC, abstractmethod
from typing import Any, Self

import torch
from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.configuration_utils import SubConfigSpec
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .describe import describe_tower, side_of
from .errors import UserError
from .outputs import TowerFeatures, TowerOutput
from .region_boxes import check_boxes, patch_grid, valid_rows


@strict
class WrappedVisionConfig(PreTrainedConfig):
    """A native vision configuration plus the layer that regions are read from.

    Args:
        tower_config: configuration of the native tower.
        region_layer: `hidden_states` entry that the readout takes.
    """

    base_config_key = "vision_config"
    sub_configs_defaults = {  # noqa: RUF012 - transformers' own declaration style
        "tower_config": SubConfigSpec(config_class=AutoConfig, model_type="clip_vision_model")
    }

    tower_config: dict | PreTrainedConfig | None = None
    region_layer: int = -1
    # Copies of the tower's own numbers: LLaVA reads them off `vision_config`.
    hidden_size: int = 0
    image_size: int = 0
    patch_size: int = 0
    num_hidden_layers: int = 0

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        tower = self.tower_config
        assert isinstance(tower, PreTrainedConfig)  # the line above made it one
        self.hidden_size, self.num_hidden_layers = tower.hidden_size, tower.num_hidden_layers
        self.image_size, self.patch_size = side_of(tower.image_size), side_of(tower.patch_size)
        if not -tower.num_hidden_layers - 1 <= self.region_layer <= tower.num_hidden_layers:
            raise UserError(
                f"region_layer must be an index of the {tower.num_hidden_layers + 1} hidden states, "
                f"got {self.region_layer}."
            )


class WrappedVisionModel(PreTrainedModel, ABC):
    """A native ViT (CLIP, SigLIP, MLCD, DINOv2, DINOv3, AIMv2) that also answers with one embedding a box."""

    config: WrappedVisionConfig
    main_input_name = "pixel_values"
    input_modalities = "image"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    def __init__(self, config: WrappedVisionConfig):
        super().__init__(config)
        assert isinstance(config.tower_config, PreTrainedConfig)
        self.spec = describe_tower(config.tower_config)
        self.tower = AutoModel.from_config(config.tower_config)

    @classmethod
    def from_native(cls, tower: PreTrainedModel, **region_fields) -> Self:
        """A loaded native tower with this readout; `region_fields` are those of the configuration. What the readout has
        to learn is new."""
        attention = tower.config._attn_implementation
        kind: Any = cls.config_class
        config = kind(tower_config=tower.config, **region_fields)
        config._attn_implementation = attention  # a new configuration has just set that of its parts to None
        with torch.device("meta"):  # a frame without memory, whose initialisation cannot touch the given weights
            model = cls(config)
        model.tower = tower
        model.new_readout(tower.device, tower.dtype)
        return model.train(tower.training)

    def new_readout(self, device: torch.device, dtype: torch.dtype) -> None:
        """Memory and first values for what the readout has to learn. A readout without parameters has nothing to do."""

    def run_native(
        self, pixel_values: torch.Tensor, hidden_states: bool | int | list[int] | None, **kwargs
    ) -> BaseModelOutputWithPooling:
        """The native tower's own output, with the hidden states that are asked for."""
        return self.tower(pixel_values, output_hidden_states=hidden_states, return_dict=True, **kwargs)

    @abstractmethod
    def read_regions(
        self, tokens: torch.Tensor, grid_hw: tuple[int, int], input_hw: tuple[int, int], boxes: torch.Tensor
    ) -> torch.Tensor:
        """`(B, R, region_dim)` from the hidden state `tokens (B, prefix + P, D)`, patches last, and checked boxes
        `(B, R, 4)` in pixels of the `(H, W)` input; padding rows may hold anything."""

    def to_native(self) -> PreTrainedModel:
        """The native tower inside."""
        return self.tower

    @property
    def region_feature_layers(self) -> tuple[int, ...]:
        """`hidden_states` entries that `forward(features=...)` needs."""
        return (self.config.region_layer % (self.config.num_hidden_layers + 1),)

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
            features: outputs of an earlier call instead of `pixel_values`; only regions are computed.
        Returns:
            `TowerOutput` with at most one prefix token (CLS) before the patches.
        Raises:
            UserError: boxes of the wrong shape or in half precision, or `features` without boxes.
        """
        layer = self.region_feature_layers[0]
        if features is not None:
            if boxes is None or layer not in features.hidden:
                raise UserError(f"features need boxes and the hidden state {layer}.")
            tokens = features.hidden[layer]
            return TowerOutput(
                region_embeds=self._checked(tokens, features.grid_hw, features.input_hw, boxes, region_counts)
            )
        if pixel_values is None:
            raise UserError("give pixel_values, or the features of an earlier call.")

        grid = patch_grid(pixel_values, self.spec.patch_size)
        return_dict = kwargs.pop("return_dict", self.config.return_dict)
        asked = kwargs.pop("output_hidden_states", self.config.output_hidden_states)
        needed = asked if boxes is None else with_layer(asked, layer)
        native = self.run_native(pixel_values, needed, **kwargs)
        states = native.get("hidden_states")
        output = TowerOutput(
            last_hidden_state=self._trim(native.last_hidden_state),
            pooler_output=native.get("pooler_output"),
            hidden_states=None if states is None else tuple(map(self._trim, states)),
            attentions=native.get("attentions"),
        )
        if boxes is not None:
            assert output.hidden_states is not None
            input_hw = (pixel_values.shape[-2], pixel_values.shape[-1])
            output.region_embeds = self._checked(output.hidden_states[layer], grid, input_hw, boxes, region_counts)
            if not asked:
                output.hidden_states = None
        return output.to_tuple() if return_dict is False else output

    def _checked(self, tokens, grid_hw, input_hw, boxes, region_counts, read=None) -> torch.Tensor:
        """`read_regions`, or what stands in for it, with its arguments checked and padding rows zero."""
        counts = check_boxes(boxes, region_counts, tokens.shape[0])
        embeds = (read or self.read_regions)(tokens, grid_hw, input_hw, boxes).to(tokens.dtype)
        return embeds * valid_rows(counts, boxes.shape[1])[..., None].to(embeds.dtype)

    def _trim(self, tokens: Any) -> Any:
        """Drop the registers: tokens 1 .. prefix-1. A hidden state nobody asked for is None and stays it."""
        prefix = self.spec.num_prefix_tokens
        return tokens if tokens is None or prefix <= 1 else torch.cat([tokens[:, :1], tokens[:, prefix:]], dim=1)


def with_layer(asked: bool | int | list[int] | None, layer: int) -> bool | list[int]:
    """The hidden states to record: the caller's and the readout's."""
    if asked is True:
        return True
    if asked is None or asked is False:
        return [layer]
    return [*([asked] if isinstance(asked, int) else asked), layer]
