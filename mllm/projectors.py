"""From tower width to language-model width: image tokens, region embeddings, positions."""

import math

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from ..vision_towers.positions import CODE_SIZE, grid_centres, sinusoidal_2d
from .config import RegionLlavaConfig


class RegionProjector(nn.Sequential):
    """LayerNorm + 2-layer MLP: `(N, region_dim) -> (N, text width)`. Separate from the image projector."""

    def __init__(self, config: RegionLlavaConfig):
        width = config.text.hidden_size
        super().__init__(
            nn.LayerNorm(config.region_dim),
            nn.Linear(config.region_dim, width),
            ACT2FN[config.projector_hidden_act],
            nn.Linear(width, width),
        )


class Merge2x2Projector(nn.Module):
    """Concatenate each 2x2 block of patches, then LayerNorm + 2-layer MLP.

    `(B, rows * columns, D) -> (B, rows/2 * columns/2, text width)`; rows and columns must be even.
    """

    def __init__(self, config: RegionLlavaConfig):
        super().__init__()
        layers = config.vision_feature_layer
        merged = 4 * config.vision.hidden_size * (1 if isinstance(layers, int) else len(layers))
        width = config.text.hidden_size
        self.norm = nn.LayerNorm(merged)
        self.linear_1 = nn.Linear(merged, merged)
        self.act = ACT2FN[config.projector_hidden_act]
        self.linear_2 = nn.Linear(merged, width)

    def forward(self, tokens: torch.Tensor, grid_hw: tuple[int, int]) -> torch.Tensor:
        batch, _, width = tokens.shape
        rows, columns = grid_hw
        blocks = tokens.view(batch, rows // 2, 2, columns // 2, 2, width).permute(0, 1, 3, 2, 4, 5)
        return self.linear_2(self.act(self.linear_1(self.norm(blocks.reshape(batch, -1, 4 * width)))))


class ImageProjector(nn.Module):
    """Everything between the tower's tokens and the language model, when it is more than LLaVA's MLP.

    Tokens of inner layers have no fixed scale (a norm of hundreds is usual), and a code of positions added to them as
    they are would be one part in a hundred: so they are normalised first (not in LLaVA).
    """

    def __init__(self, config: RegionLlavaConfig):
        super().__init__()
        width = config.text.hidden_size
        self.merge_size = config.merge_size
        self.project = Merge2x2Projector(config) if self.merge_size == 2 else _normed_mlp(config)
        self.position = nn.Linear(CODE_SIZE, width, bias=False) if config.image_position == "sin2d" else None
        self.row_end = nn.Parameter(torch.randn(width) / math.sqrt(width)) if config.row_end else None

    def forward(self, tokens: torch.Tensor, grid_hw: tuple[int, int]) -> torch.Tensor:
        """`(B, rows * columns, D)` tokens of a grid to `(B, image tokens, text width)`."""
        rows, columns = grid_hw
        if self.merge_size == 2:
            projected = self.project(tokens, grid_hw)
            rows, columns = rows // 2, columns // 2
        else:
            projected = self.project(tokens)
        if self.position is not None:
            code = sinusoidal_2d(grid_centres(rows, columns, projected.device))
            projected = projected + self.position(code.to(projected.dtype))
        if self.row_end is not None:
            lines = projected.unflatten(1, (rows, columns))
            ends = self.row_end.expand(lines.shape[0], rows, 1, -1).to(lines.dtype)
            projected = torch.cat([lines, ends], dim=2).flatten(1, 2)
        return projected


def _normed_mlp(config: RegionLlavaConfig) -> nn.Sequential:
    layers = config.vision_feature_layer
    width = config.vision.hidden_size * (1 if isinstance(layers, int) else len(layers))
    return nn.Sequential(nn.LayerNorm(width), LlavaMultiModalProjector(config))


def image_token_count(grid_hw: tuple[int, int], merge_size: int, row_end: bool) -> int:
    """How many language-model tokens an image of `grid_hw` patches takes."""
    rows, columns = grid_hw[0] // merge_size, grid_hw[1] // merge_size
    return rows * (columns + int(row_end))
