"""RoIAlign on the patch tokens of any native Hugging Face ViT: a readout without parameters."""

import torch
from huggingface_hub.dataclasses import strict

from .errors import UserError
from .roi_pool import roi_mean
from .wrapped_model import WrappedVisionConfig, WrappedVisionModel


@strict
class RoiVisionConfig(WrappedVisionConfig):
    """`WrappedVisionConfig` plus the size of RoIAlign.

    Args:
        roi_size: RoIAlign output is `roi_size x roi_size`, averaged into one vector.
    """

    model_type = "roi_vision_model"

    roi_size: int = 7

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.roi_size < 1:
            raise UserError(f"roi_size must be at least 1, got {self.roi_size}.")


class RoiVisionModel(WrappedVisionModel):
    """A native ViT whose regions are averages over RoIAlign's samples."""

    config: RoiVisionConfig
    config_class = RoiVisionConfig
    base_model_prefix = "roi"

    def __init__(self, config: RoiVisionConfig):
        super().__init__(config)
        self.post_init()

    def read_regions(
        self, tokens: torch.Tensor, grid_hw: tuple[int, int], input_hw: tuple[int, int], boxes: torch.Tensor
    ) -> torch.Tensor:
        patches = tokens[:, -grid_hw[0] * grid_hw[1] :]
        return roi_mean(patches, grid_hw, boxes, self.spec.patch_size, self.config.roi_size)
