"""RoIAlign on the patch tokens of any native Hugging Face ViT: a readout without parameters."""

import torch
from huggingface_hub.dataclasses import strict
from torchvision.ops import roi_align

from .errors import UserError
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
        return pooled.mean((2, 3)).view(batch, regions, pooled.shape[1])
