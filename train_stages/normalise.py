"""Cached pixels -> what a tower takes, on the device of the model."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class PixelNorm(nn.Module):
    """uint8 (B, 3, H, W) -> float, `(x / 255 - mean) / std`; float input is taken as normalised already."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.shift = nn.Buffer(255 * torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.scale = nn.Buffer(1 / (255 * torch.tensor(std).view(3, 1, 1)), persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        return pixels if pixels.is_floating_point() else (pixels - self.shift) * self.scale
