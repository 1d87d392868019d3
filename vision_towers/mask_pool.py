"""Means of patch features over masks."""

import torch

from .errors import UserError


def mask_mean(features: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """sum_p m_p f_p / sum_p m_p for each mask, `(B, R, D)` (CLIPSelf and FineCLIP pool masks so); 0 for an empty one.

    Args:
        features: `(B, rows, columns, D)`.
        masks: `(B, R, rows, columns)` float, the share of each patch that the mask covers. Taken as shares, not
            thresholded, so that a mask smaller than a patch keeps its place (not in the paper; we do).
    Computed in float32 at least.

    Raises:
        UserError: masks of another shape.
    """
    batch, rows, columns, _ = features.shape
    if masks.ndim != 4 or (masks.shape[0], *masks.shape[2:]) != (batch, rows, columns):
        raise UserError(
            f"masks must be (B={batch}, R, {rows}, {columns}), the covered share of each patch, "
            f"got {tuple(masks.shape)}."
        )
    with torch.autocast(features.device.type, enabled=False):  # a sum over many patches needs the digits
        dtype = torch.promote_types(features.dtype, torch.float32)
        shares = masks.to(dtype).flatten(2)
        total = shares.sum(-1, keepdim=True)
        weights = shares / torch.where(total > 0, total, torch.ones_like(total))
        return (weights @ features.to(dtype).flatten(1, 2)).to(features.dtype)
