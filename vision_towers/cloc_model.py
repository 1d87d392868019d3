"""CLOC: a tower with a Prompter beside a text tower, in one space (Chen et al., arXiv 2410.02746)."""

import math
from dataclasses import dataclass

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedConfig, PreTrainedModel
from transformers.configuration_utils import SubConfigSpec
from transformers.utils.generic import ModelOutput

from .cloc_vision import ClocVisionConfig, ClocVisionModel
from .errors import UserError
from .region_boxes import valid_rows
from .text_tower import pooled_texts


@strict
class ClocConfig(PreTrainedConfig):
    """Configurations of the two towers.

    Args:
        vision_config: of the tower; its `projection_dim` is the width of the joint space.
        text_config: of the text tower, CLIP's (the paper says as much, and not its size).
        logit_scale_init_value: log of the first inverse temperature, shared by images and regions (not in the paper;
            CLIP's value).
    """

    model_type = "cloc"
    sub_configs_defaults = {  # noqa: RUF012 - transformers' own declaration style
        "vision_config": SubConfigSpec(config_class=ClocVisionConfig),
        "text_config": SubConfigSpec(config_class=CLIPTextConfig),
    }

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    logit_scale_init_value: float = math.log(1 / 0.07)


@dataclass
class ClocOutput(ModelOutput):
    """Embeddings in the joint space, none of them normalised; n counts the real regions of the batch, image by image.

    `image_embeds`, `text_embeds (B, J)`: images and captions. `region_embeds`, `region_text_embeds (n, J)`: regions by
    their boxes, and their texts. `text_boxes (n, 4)` float32: where each region's text is, xyxy in input pixels.
    """

    image_embeds: torch.Tensor | None = None
    text_embeds: torch.Tensor | None = None
    region_embeds: torch.Tensor | None = None
    region_text_embeds: torch.Tensor | None = None
    text_boxes: torch.Tensor | None = None


class ClocModel(PreTrainedModel):
    """`vision_tower` (a `ClocVisionModel`), `text_tower`, and the projections of images and texts.

    The image's embedding is the tower's pooled output (the paper pools by attention), or the mean of its patches where
    it has none.
    """

    config: ClocConfig
    config_class = ClocConfig
    base_model_prefix = "cloc_model"
    main_input_name = "pixel_values"
    _supports_sdpa = True

    def __init__(self, config: ClocConfig):
        super().__init__(config)
        vision, text = config.vision_config, config.text_config
        assert isinstance(vision, ClocVisionConfig) and isinstance(text, CLIPTextConfig)
        self.vision_tower = ClocVisionModel(vision)
        self.text_tower = CLIPTextModel(text)
        self.image_projection = nn.Linear(vision.hidden_size, vision.projection_dim, bias=False)
        self.text_projection = nn.Linear(text.hidden_size, vision.projection_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor([config.logit_scale_init_value]))  # (1,): FSDP2 shards no scalars
        self.post_init()

    def encode_texts(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """`(n, J)` of texts `(n, T)`, padded on the right, each ending in its end token. n may be 0."""
        return self.text_projection(pooled_texts(self.text_tower, input_ids, attention_mask))

    def encode_images(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """`(B, J)` of images `(B, 3, H, W)`."""
        return self._project_images(self.vision_tower(pixel_values))

    def encode_regions(
        self, pixel_values: torch.Tensor, boxes: torch.Tensor, region_counts: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`(B, R, J)` of padded boxes `(B, R, 4)` in pixels of the input; padding rows are zero."""
        return self.vision_tower.projection(self.vision_tower(pixel_values, boxes, region_counts).region_embeds)

    def locate(self, pixel_values: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
        """Boxes `(B, T, 4)` float32, xyxy in pixels of the input, of texts `(B, T, J)` of `encode_texts`."""
        return self.vision_tower(pixel_values, texts=texts).text_boxes

    def forward(
        self,
        pixel_values: torch.Tensor,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        boxes: torch.Tensor,
        region_counts: torch.Tensor,
        region_input_ids: torch.Tensor,
        region_attention_mask: torch.Tensor,
        **kwargs,
    ) -> ClocOutput:
        """Everything that CLOC's losses need, from one pass of each tower over the images.

        Args:
            pixel_values: `(B, 3, H, W)`, normalised. input_ids, attention_mask: `(B, T)`, a caption of each image.
            boxes: `(B, R, 4)` float32, xyxy in input pixels, R at least 1. region_counts: `(B,)`; 0 for an image
                without regions.
            region_input_ids, region_attention_mask: `(n, T)`, a text of each real region, image by image.
        Raises:
            UserError: the texts are not as many as the regions.
        """
        valid = valid_rows(region_counts, boxes.shape[1])
        if int(valid.sum()) != len(region_input_ids):
            raise UserError(f"{int(valid.sum())} regions have {len(region_input_ids)} texts; give one for each.")
        region_texts = self.encode_texts(region_input_ids, region_attention_mask)
        prompts = region_texts.new_zeros(*valid.shape, region_texts.shape[-1])
        prompts[valid] = region_texts
        seen = self.vision_tower(pixel_values, boxes, region_counts, texts=prompts)
        return ClocOutput(
            image_embeds=self._project_images(seen),
            text_embeds=self.encode_texts(input_ids, attention_mask),
            region_embeds=self.vision_tower.projection(seen.region_embeds[valid]),
            region_text_embeds=region_texts,
            text_boxes=seen.text_boxes[valid],
        )

    def _project_images(self, seen) -> torch.Tensor:
        pooled = seen.pooler_output
        if pooled is None:
            prefix = min(1, self.vision_tower.spec.num_prefix_tokens)
            pooled = seen.last_hidden_state[:, prefix:].mean(1)
        return self.image_projection(pooled)
