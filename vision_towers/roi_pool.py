"""RoIAlign of patch tokens, averaged."""

import torch
from torchvision.ops import roi_align


def roi_mean(
    patches: torch.Tensor, grid_hw: tuple[int, int], boxes: torch.Tensor, patch_size: int, size: int
) -> torch.Tensor:
    """The mean over `size x size` samples of each box, `(B, R, D)` float32.

    Args:
        patches: `(B, rows * columns, D)`. boxes: `(B, R, 4)` xyxy in input pixels.
    """
    rows, columns = grid_hw
    feature_map = patches.transpose(1, 2).unflatten(2, (rows, columns)).float()
    batch, regions = boxes.shape[:2]
    index = torch.arange(batch, device=boxes.device, dtype=torch.float32).repeat_interleave(regions)
    corners = boxes.reshape(-1, 4).float()
    # RoIAlign takes no sample at all in a box without area and would answer zero: a sliver reads the point instead.
    far = torch.maximum(corners[:, 2:], corners[:, :2] + 1e-3)
    rois = torch.cat([index[:, None], corners[:, :2], far], dim=1)
    # aligned=True shifts by half a pixel: the convention of continuous edges that our boxes have.
    pooled = roi_align(feature_map, rois, (size, size), spatial_scale=1 / patch_size, aligned=True)
    return pooled.mean((2, 3)).view(batch, regions, pooled.shape[1])
