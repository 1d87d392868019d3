"""RegionLlava: LLaVA whose text may hold `<region>` placeholders, filled with projected region embeddings."""

import torch
from transformers import LlavaForConditionalGeneration, LlavaModel
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import select_hidden_states

from ..vision_towers import TowerOutput, describe_tower
from .config import RegionLlavaConfig
from .projectors import ImageProjector, RegionProjector
from .region_model import RegionGeneration, RegionModel


class RegionLlavaModel(RegionModel, LlavaModel):
    """The vision tower, both projectors and the language model, without the head."""

    config: RegionLlavaConfig
    config_class = RegionLlavaConfig

    def __init__(self, config: RegionLlavaConfig):
        super().__init__(config)
        if not config.plain_exportable:
            self.multi_modal_projector = ImageProjector(config)
        self.region_projector = RegionProjector(config)
        self.post_init()

    @merge_with_config_defaults
    @can_return_tuple
    @select_hidden_states("vision_feature_layer")
    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        boxes: torch.Tensor | None = None,
        region_counts: torch.Tensor | None = None,
        **kwargs,
    ) -> TowerOutput:
        """Run the tower once, for image tokens and regions.

        Args:
            pixel_values: `(images, 3, H, W)`, one size a batch.
            boxes: `(images, R_max, 4)` float32 xyxy in pixels of that `(H, W)` frame, padded.
            region_counts: `(images,)`.
        Returns:
            The tower's output with `pooler_output` replaced by a list of `(image tokens, text width)`, one an image
            (as LLaVA does), and `region_embeds` by the projected rows `(sum of region_counts, text width)`.
        """
        if boxes is not None:
            kwargs |= {"boxes": boxes, "region_counts": region_counts}
        output = self.vision_tower(pixel_values, return_dict=True, **kwargs)
        assert vision_feature_layer is not None  # filled in from the config
        layers = [vision_feature_layer] if isinstance(vision_feature_layer, int) else vision_feature_layer
        selected = torch.cat([output.hidden_states[layer] for layer in layers], dim=-1)
        if vision_feature_select_strategy == "default":
            selected = selected[:, 1:]
        input_hw = (pixel_values.shape[-2], pixel_values.shape[-1])
        features = TowerOutput(
            last_hidden_state=output.last_hidden_state,
            pooler_output=list(self.project_image(selected, input_hw)),  # pyright: ignore[reportArgumentType]
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )
        if boxes is not None:
            features.region_embeds = self.project_regions(output.region_embeds, region_counts)
        return features

    def project_image(self, tokens: torch.Tensor, input_hw: tuple[int, int]) -> torch.Tensor:
        """Patch tokens `(B, patches, D)` of inputs of `input_hw` pixels to `(B, image tokens, text width)`."""
        if self.config.plain_exportable:  # by its config, as peft may have wrapped the projector
            return self.multi_modal_projector(tokens)
        return self.multi_modal_projector(tokens, describe_tower(self.config.vision).grid(*input_hw))

    def blank_picture(self, like: torch.Tensor) -> dict[str, torch.Tensor]:
        """See `RegionModel`."""
        side = describe_tower(self.config.vision).image_size
        return {"pixel_values": like.new_zeros(1, 3, side, side)}


class RegionLlavaForConditionalGeneration(RegionGeneration, LlavaForConditionalGeneration):
    """RegionLlava with its language-model head; without regions equal to plain LLaVA to the bit."""

    config: RegionLlavaConfig
    config_class = RegionLlavaConfig

    def __init__(self, config: RegionLlavaConfig):
        # Skips LlavaForConditionalGeneration.__init__, which would build a plain inner model only to have it replaced.
        super(LlavaForConditionalGeneration, self).__init__(config)
        self.model = RegionLlavaModel(config)
        text = config.text
        self.lm_head = torch.nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.post_init()
