"""Open-vocabulary semantic segmentation: every place of an image against the texts of classes.

UMG-CLIP (arXiv 2401.06397) tunes a frozen tower for semantic segmentation with a few parameters; its head is not known
to us, and this one is ours. With e_p the patches in the space of texts, n(x) = x / |x| and up() bilinear interpolation,

    z_p = n( up(n(e))_p + R(decoder)_p ),        logits_pc = s z_p . n(t_c)

R starts at 0: untrained, the head is the zero-shot comparison of patches and texts (MaskCLIP's, arXiv 2112.01071).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .decoder import PixelDecoder
from .label_maps import VOID

FIRST_SCALE = 1 / 0.07  # CLIP's
LARGEST_SCALE = 100.0  # CLIP's, too


class LogScale(nn.Module):
    """The factor s of cosines, learned as its log."""

    def __init__(self) -> None:
        super().__init__()
        self.log = nn.Parameter(torch.tensor(math.log(FIRST_SCALE)))

    def forward(self) -> Tensor:
        return self.log.clamp(max=math.log(LARGEST_SCALE)).exp()


class SemanticHead(nn.Module):
    """dim: D of dense features. joint: J of the space. width: channels of the decoder."""

    def __init__(self, dim: int, joint: int, width: int):
        super().__init__()
        self.decoder = PixelDecoder(dim, width)
        self.residual = zeros(nn.Conv2d(width, joint, 1))
        self.scale = LogScale()

    def forward(self, dense: Tensor, embeds: Tensor, pixels: Tensor, texts: Tensor) -> Tensor:
        """Logits `(B, C, 4 rows, 4 columns)`.

        Args:
            dense: `(B, D, rows, columns)`. embeds: `(B, J, rows, columns)`, the same in the space of texts.
            pixels: `(B, 3, H, W)`, normalised. texts: `(C, J)` of length 1.
        """
        grid = self.decoder(dense, pixels)
        places = enlarged(embeds, grid) + self.residual(grid)
        return self.scale() * torch.einsum("bjyx,cj->bcyx", F.normalize(places, dim=1), texts)


def semantic_loss(logits: Tensor, truth: Tensor) -> Tensor:
    """Cross entropy of each labelled pixel; logits `(B, C, rows, columns)`, truth `(B, H, W)` with `VOID`."""
    logits = F.interpolate(logits, truth.shape[-2:], mode="bilinear")
    total = F.cross_entropy(logits, truth, ignore_index=VOID, reduction="sum")
    return total / (truth != VOID).sum().clamp(min=1)  # a batch may be void altogether


def enlarged(embeds: Tensor, grid: Tensor) -> Tensor:
    """Embeddings `(B, J, rows, columns)`, of length 1 first, on the places of `grid`."""
    return F.interpolate(F.normalize(embeds, dim=1), grid.shape[-2:], mode="bilinear")


def zeros(module: nn.Module) -> nn.Module:
    """The module, with weights of 0."""
    for weight in module.parameters():
        nn.init.zeros_(weight)
    return module
