"""From patches to finer places: what both heads are built on. The paper names no decoder; this one is ours."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.convnext import LayerNorm2d

FINER = 4  # places of the decoder in a patch's side


class PixelDecoder(nn.Module):
    """Dense features `(B, D, rows, columns)` and pixels `(B, 3, H, W)` to `(B, width, 4 rows, 4 columns)`.

    Features are enlarged by bilinear interpolation, twice by 2, each time with a convolution; in between, features of
    the pixels themselves are added, as the tower has lost where edges lie inside a patch.
    """

    def __init__(self, dim: int, width: int):
        super().__init__()
        self.enter = nn.Sequential(LayerNorm2d(dim), nn.Conv2d(dim, width, 1))
        self.coarse = _smooth(width)
        self.pixels = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), LayerNorm2d(width), nn.GELU())
        self.fine = _smooth(width)

    def forward(self, dense: Tensor, pixels: Tensor) -> Tensor:
        found = self.coarse(_twice(self.enter(dense)))
        found = _twice(found)
        return self.fine(found + self.pixels(F.interpolate(pixels, found.shape[-2:], mode="area")))


def _smooth(width: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(width, width, 3, padding=1, bias=False), LayerNorm2d(width), nn.GELU())


def _twice(grid: Tensor) -> Tensor:
    return F.interpolate(grid, scale_factor=2, mode="bilinear")
