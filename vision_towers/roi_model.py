"""Any native Hugging Face ViT as a region tower: RoIAlign on its patch tokens.

The image stream is the native tower's, except that register tokens are left out: LLaVA drops token 0 at most, so
registers would reach the language model as if they were patches.
"""

from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torchvision.ops import roi_align
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.configuration_utils import SubConfigSpec

from .describe import describe_tower, side_of
from .errors import UserError
from .outputs import TowerFeatures, TowerOutput
from .region_boxes import check_boxes, patch_grid, valid_rows


@strict
class RoiVisionConfig(PreTrainedConfig):
    """A native vision configuration plus where and how regions are read.

    Args:
        tower_config: configuration of the native tower.
        region_layer: `hidden_states` entry that RoIAlign reads.
        roi_size: RoIAlign output is `roi_size x roi_size`, averaged into one vector.
    """

    model_type = "roi_vision_model"
    base_config_key = "vision_config"
    sub_configs_defaults = {  # noqa: RUF012 - transformers' own declaration style
        "tower_config": SubConfigSpec(config_class=AutoConfig, model_type="clip_vision_model")
    }

    tower_config: dict | PreTrainedConfig | None = None
    region_layer: int = -1
    roi_size: int = 7
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
        if self.roi_size < 1:
            raise UserError(f"roi_size must be at least 1, got {self.roi_size}.")


class RoiVisionModel(PreTrainedModel):
    """A native ViT (CLIP, SigLIP, MLCD, DINOv2, DINOv3, AIMv2) that also answers with one embedding a box."""

    config: RoiVisionConfig
    config_class = RoiVisionConfig
    main_input_name = "pixel_values"
    input_modalities = "image"
    base_model_prefix = "roi"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    def __init__(self, config: RoiVisionConfig):
        super().__init__(config)
        assert isinstance(config.tower_config, PreTrainedConfig)
        self.spec = describe_tower(config.tower_config)
        self.tower = AutoModel.from_config(config.tower_config)
        self.post_init()

    @classmethod
    def from_native(cls, tower: PreTrainedModel, **region_fields) -> "RoiVisionModel":
        """Wrap a loaded native tower; `region_fields` are `region_layer` and `roi_size`."""
        attention = tower.config._attn_implementation
        config = RoiVisionConfig(tower_config=tower.config, **region_fields)
        config._attn_implementation = attention  # a new configuration has just set that of its parts to None
        with torch.device("meta"):  # a frame without memory, whose initialisation cannot touch the given weights
            model = cls(config)
        model.tower = tower
        return model.train(tower.training)

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
            return TowerOutput(
                region_embeds=self._align(features.hidden[layer], features.grid_hw, boxes, region_counts)
            )
        if pixel_values is None:
            raise UserError("give pixel_values, or the features of an earlier call.")

        grid = patch_grid(pixel_values, self.spec.patch_size)
        return_dict = kwargs.pop("return_dict", self.config.return_dict)
        asked = kwargs.pop("output_hidden_states", self.config.output_hidden_states)
        needed = asked if boxes is None else _with_layer(asked, layer)
        native = self.tower(pixel_values, output_hidden_states=needed, return_dict=True, **kwargs)
        states = native.get("hidden_states")
        output = TowerOutput(
            last_hidden_state=self._trim(native.last_hidden_state),
            pooler_output=native.get("pooler_output"),
            hidden_states=None if states is None else tuple(map(self._trim, states)),
            attentions=native.get("attentions"),
        )
        if boxes is not None:
            assert output.hidden_states is not None
            output.region_embeds = self._align(output.hidden_states[layer], grid, boxes, region_counts)
            if not asked:
                output.hidden_states = None
        return output.to_tuple() if return_dict is False else output

    def _trim(self, tokens: Any) -> Any:
        """Drop the registers: tokens 1 .. prefix-1. A hidden state nobody asked for is None and stays it."""
        prefix = self.spec.num_prefix_tokens
        return tokens if tokens is None or prefix <= 1 else torch.cat([tokens[:, :1], tokens[:, prefix:]], dim=1)

    def _align(self, tokens: torch.Tensor, grid_hw: tuple[int, int], boxes: torch.Tensor, region_counts):
        counts = check_boxes(boxes, region_counts, tokens.shape[0])
        rows, columns = grid_hw
        patches = tokens[:, -rows * columns :]
        feature_map = patches.transpose(1, 2).unflatten(2, (rows, columns)).float()
        batch, regions = boxes.shape[:2]
        index = torch.arange(batch, device=boxes.device, dtype=torch.float32).repeat_interleave(regions)
        corners = boxes.reshape(-1, 4).float()
        # RoIAlign takes no sample at all in a box without area and would answer zero: a sliver reads the point instead.
        far = torch.maximum(corners[:, 2:], corners[:, :2] + 1e-3)
        rois = torch.cat([index[:, None], corners[:, :2], far], dim=1)
        size = self.config.roi_size
        # aligned=True shifts by half a pixel: the convention of continuous edges that our boxes have.
        pooled = roi_align(feature_map, rois, (size, size), spatial_scale=1 / self.spec.patch_size, aligned=True)
        embeds = pooled.mean((2, 3)).view(batch, regions, pooled.shape[1]).to(tokens.dtype)
        return embeds * valid_rows(counts, regions)[..., None].to(embeds.dtype)


def _with_layer(asked: bool | int | list[int] | None, layer: int) -> bool | list[int]:
    """The hidden states to record: the caller's and the readout's."""
    if asked is True:
        return True
    if asked is None or asked is False:
        return [layer]
    return [*([asked] if isinstance(asked, int) else asked), layer]
