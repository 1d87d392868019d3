"""UMG-CLIP: images, boxes, masks and patches in one space with texts (Shi et al., arXiv 2401.06397)."""

import math
from dataclasses import dataclass
from typing import Any, Self

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import AutoConfig, CLIPModel, PreTrainedConfig, PreTrainedModel, SiglipModel
from transformers.configuration_utils import SubConfigSpec
from transformers.utils.generic import ModelOutput

from .errors import UserError
from .mask_pool import mask_mean
from .region_boxes import valid_rows
from .text_tower import fixed_text_length, new_text_tower, pooled_texts, text_width
from .umg_clip_vision import UmgClipVisionConfig, UmgClipVisionModel, UmgClipVisionOutput


@strict
class UmgClipConfig(PreTrainedConfig):
    """Configurations of the two towers and of what joins them. The paper's sizes and temperatures are not known to us.

    Args:
        vision_config: of the tower. text_config: of the text tower, CLIP's or SigLIP's.
        projection_dim: width of the joint space; None: no projections, the towers end in one space by themselves (as a
            SigLIP's do).
        logit_scale_init_value: log of the first inverse temperature, of images and of regions (CLIP's).
        tag_scale_init_value, tag_bias_init_value: log of the first scale, and the bias, of the tags' sigmoid (as
            SigLIP's begins).
    """

    model_type = "umg_clip"
    sub_configs_defaults = {  # noqa: RUF012 - transformers' own declaration style
        "vision_config": SubConfigSpec(config_class=UmgClipVisionConfig),
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="clip_text_model"),
    }

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    projection_dim: int | None = 512
    logit_scale_init_value: float = math.log(1 / 0.07)
    tag_scale_init_value: float = math.log(10.0)
    tag_bias_init_value: float = -10.0

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        vision, text = self.vision_config, self.text_config
        assert isinstance(vision, UmgClipVisionConfig) and isinstance(text, PreTrainedConfig)
        if self.projection_dim is None and vision.hidden_size != text_width(text):
            raise UserError(
                f"without a projection_dim both towers must be equally wide, and the tower gives {vision.hidden_size}, "
                f"the text tower {text_width(text)}."
            )


@dataclass
class UmgClipOutput(ModelOutput):
    """Embeddings in the joint space, none of them normalised; n counts the real regions of the batch, image by image.

    `image_embeds (B, J)`. `text_embeds`, `tag_embeds (m, J)`: captions and tags. `region_embeds`, `mask_embeds`,
    `region_text_embeds (n, J)`: regions by their boxes, by their masks (0 where a mask is empty), and their texts.
    """

    image_embeds: torch.Tensor | None = None
    text_embeds: torch.Tensor | None = None
    region_embeds: torch.Tensor | None = None
    mask_embeds: torch.Tensor | None = None
    region_text_embeds: torch.Tensor | None = None
    tag_embeds: torch.Tensor | None = None


class UmgClipModel(PreTrainedModel):
    """`vision_tower` (a `UmgClipVisionModel`), `text_tower`, and the projections of what is seen and of texts.

    One image projection serves images, regions, masks and patches: the tower's dense features lie in the space of its
    pooled output. The image's embedding is that pooled output, or the mean of the dense features where it has none.
    Temperatures, as logs: `logit_scale` of images and captions, `region_logit_scale` of regions and masks and their
    texts (FG-CLIP has one of its own too), `tag_logit_scale` and `tag_logit_bias` of the tags' sigmoid.
    """

    config: UmgClipConfig
    config_class = UmgClipConfig
    base_model_prefix = "umg_clip_model"
    main_input_name = "pixel_values"
    _supports_sdpa = True

    def __init__(self, config: UmgClipConfig):
        super().__init__(config)
        vision, text, joint = config.vision_config, config.text_config, config.projection_dim
        assert isinstance(vision, UmgClipVisionConfig) and isinstance(text, PreTrainedConfig)
        self.vision_tower = UmgClipVisionModel(vision)
        self.text_tower = new_text_tower(text)
        self.image_projection = nn.Identity() if joint is None else nn.Linear(vision.hidden_size, joint, bias=False)
        self.text_projection = nn.Identity() if joint is None else nn.Linear(text_width(text), joint, bias=False)
        # Of shape (1,), because FSDP2 shards no scalars.
        self.logit_scale = nn.Parameter(torch.tensor([config.logit_scale_init_value]))
        self.region_logit_scale = nn.Parameter(torch.tensor([config.logit_scale_init_value]))
        self.tag_logit_scale = nn.Parameter(torch.tensor([config.tag_scale_init_value]))
        self.tag_logit_bias = nn.Parameter(torch.tensor([config.tag_bias_init_value]))
        self.post_init()

    @classmethod
    def from_pair(cls, pair: PreTrainedModel, **region_fields) -> Self:
        """A loaded CLIP or SigLIP with dense features; its weights are taken over, not copied.

        The pair's temperature becomes that of images and of regions, and a SigLIP's temperature and bias also those of
        the tags. `region_fields` are those of `UmgClipVisionConfig`.

        Raises:
            UserError: a model of another kind.
        """
        if not isinstance(pair, CLIPModel | SiglipModel):
            raise UserError(f"a UMG-CLIP is made from a clip or a siglip, and this is a {pair.config.model_type}.")
        joint = pair.config.projection_dim if isinstance(pair, CLIPModel) else None
        tower = UmgClipVisionModel.from_native(pair.vision_model, **region_fields)
        text_attention = pair.text_model.config._attn_implementation
        vision_attention = tower.config._attn_implementation
        config = UmgClipConfig(vision_config=tower.config, text_config=pair.text_model.config, projection_dim=joint)
        # A new configuration has just set those of its parts to None.
        pair.text_model.config._attn_implementation = text_attention
        tower.config._attn_implementation = vision_attention
        with torch.device("meta"):  # a frame without memory, whose initialisation cannot touch the given weights
            model = cls(config)
        model.vision_tower, model.text_tower = tower, pair.text_model
        scale = pair.logit_scale.detach().reshape(1)
        model.logit_scale = nn.Parameter(scale.clone())
        model.region_logit_scale = nn.Parameter(scale.clone())
        tags = [scale.new_tensor([value]) for value in (config.tag_scale_init_value, config.tag_bias_init_value)]
        if isinstance(pair, CLIPModel):
            model.image_projection, model.text_projection = pair.visual_projection, pair.text_projection
        else:
            tags = [scale.clone(), pair.logit_bias.detach().reshape(1)]
        model.tag_logit_scale, model.tag_logit_bias = (nn.Parameter(value) for value in tags)
        return model.train(pair.training)

    @property
    def text_length(self) -> int | None:
        """Tokens that every text has to be padded to (SigLIP); None where each may have its own length."""
        return fixed_text_length(self.text_tower.config)

    def encode_texts(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """`(n, J)` of texts `(n, T)`, padded on the right, each ending in its end token; to `text_length` if it is set.

        Raises:
            UserError: texts that are not padded to `text_length`.
        """
        return self.text_projection(pooled_texts(self.text_tower, input_ids, attention_mask))

    def encode_images(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """`(B, J)` of images `(B, 3, H, W)`."""
        return self._project_images(self._see(pixel_values))

    def encode_regions(
        self, pixel_values: torch.Tensor, boxes: torch.Tensor, region_counts: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`(B, R, J)` of padded boxes `(B, R, 4)` in pixels of the input; padding rows are zero."""
        return self.image_projection(self.vision_tower(pixel_values, boxes, region_counts).region_embeds)

    def encode_masks(
        self, pixel_values: torch.Tensor, masks: torch.Tensor, region_counts: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`(B, R, J)` of masks `(B, R, rows, columns)`, the share of each patch that a mask covers; rows of padding,
        and of masks that cover nothing, are zero.

        Raises:
            UserError: masks of another shape.
        """
        embeds = self.image_projection(mask_mean(self._see(pixel_values).dense_features, masks))
        if region_counts is None:
            return embeds
        return embeds * valid_rows(region_counts.to(embeds.device), masks.shape[1])[..., None].to(embeds.dtype)

    def dense_embeddings(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """`(B, rows, columns, J)`: every patch in the space of the texts."""
        return self.image_projection(self._see(pixel_values).dense_features)

    def forward(
        self,
        pixel_values: torch.Tensor,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        boxes: torch.Tensor,
        masks: torch.Tensor,
        region_counts: torch.Tensor,
        region_input_ids: torch.Tensor,
        region_attention_mask: torch.Tensor,
        tag_input_ids: torch.Tensor,
        tag_attention_mask: torch.Tensor,
        **kwargs,
    ) -> UmgClipOutput:
        """Everything that UMG-CLIP's losses need, from one pass of the tower over the images.

        Args:
            pixel_values: `(B, 3, H, W)`, normalised.
            boxes: `(B, R, 4)` float32, xyxy in input pixels. masks: `(B, R, rows, columns)`, the share of each patch
                that the region covers; nothing but 0 for a region without a mask. region_counts: `(B,)`.
            input_ids, tag_input_ids and their attention masks: `(m, T)`, any captions and tags; m may be 0.
            region_input_ids, region_attention_mask: `(n, T)`, a text of each real region, image by image.
        Raises:
            UserError: the texts are not as many as the regions, or masks of another shape.
        """
        valid = valid_rows(region_counts, boxes.shape[1])
        if int(valid.sum()) != len(region_input_ids):
            raise UserError(f"{int(valid.sum())} regions have {len(region_input_ids)} texts; give one for each.")
        seen = self._see(pixel_values, boxes, region_counts)
        return UmgClipOutput(
            image_embeds=self._project_images(seen),
            text_embeds=self.encode_texts(input_ids, attention_mask),
            region_embeds=self.image_projection(seen.region_embeds[valid]),
            mask_embeds=self.image_projection(mask_mean(seen.dense_features, masks)[valid]),
            region_text_embeds=self.encode_texts(region_input_ids, region_attention_mask),
            tag_embeds=self.encode_texts(tag_input_ids, tag_attention_mask),
        )

    def _see(self, pixel_values: torch.Tensor, boxes: Any = None, region_counts: Any = None) -> Any:
        seen = self.vision_tower(pixel_values, boxes, region_counts, output_dense_features=True)
        assert isinstance(seen, UmgClipVisionOutput)
        return seen

    def _project_images(self, seen) -> torch.Tensor:
        pooled = seen.pooler_output
        return self.image_projection(seen.dense_features.mean((1, 2)) if pooled is None else pooled)
