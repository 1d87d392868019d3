"""A pyramid of feature maps from the tokens of a frozen ViT, as in RICE's probe (arXiv 2507.20025, section 4).

A plain ViT has maps of one size. The paper makes more of them, from a quarter to four times as fine, by max-pooling and
unpooling; with which layers is not stated. Ours are ViTDet's (simple pyramid, arXiv 2203.16527, section 3), and one
level more. Of the tokens at stride p, the patch's side::

    p / 4: deconvolution 2 x 2, twice    p / 2: once    p: as it is    2 p: max-pooling 2 x 2    4 p: 4 x 4

each followed by a 1 x 1 and a 3 x 3 convolution to `width` channels, with layer norm.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.convnext import LayerNorm2d
from transformers import PreTrainedModel

from ...vision_towers import TowerSpec

COARSEST = 4  # stride of the coarsest level, in patches; the finest has a quarter of a patch


class FrozenPyramid(nn.Module):
    """Images -> `{"0" ... "4"}`, maps `(B, width, rows, columns)` at strides p/4 to 4p: a torchvision backbone.

    The tower stays as it is: it runs without gradients, and is no part of this module, so that neither its parameters
    nor `train()` reach it. Its tokens, of the default feature layer, are normalised each by itself first, as the scale
    of the last layers is some thousands in some towers (not in ViTDet, which trains the tower).

    side: of the square image, pixels. The input may be larger, padded at the right and at the bottom: the tower sees
    the image alone, and its tokens are padded by zeros.
    """

    def __init__(self, tower: PreTrainedModel, spec: TowerSpec, side: int, width: int):
        super().__init__()
        self._tower, self._spec, self._side = (tower,), spec, side
        dim = spec.hidden_size
        self.out_channels = width
        self.norm = LayerNorm2d(dim)
        half = max(width, dim // 2)
        twice = [nn.ConvTranspose2d(dim, half, 2, stride=2), LayerNorm2d(half), nn.GELU()]
        self.levels = nn.ModuleList(
            [
                nn.Sequential(*twice, nn.ConvTranspose2d(half, half, 2, stride=2), nn.GELU(), *_smooth(half, width)),
                nn.Sequential(nn.ConvTranspose2d(dim, half, 2, stride=2), nn.GELU(), *_smooth(half, width)),
                nn.Sequential(*_smooth(dim, width)),
                nn.Sequential(nn.MaxPool2d(2), *_smooth(dim, width)),
                nn.Sequential(nn.MaxPool2d(COARSEST), *_smooth(dim, width)),
            ]
        )

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        """images: `(B, 3, H, W)`, normalised; H and W the side, rounded up to a multiple of `COARSEST` patches."""
        rows, columns = self._spec.grid(*images.shape[-2:])
        own = self._spec.grid(self._side, self._side)
        with torch.no_grad():
            seen = self._tower[0](images[..., : self._side, : self._side], output_hidden_states=True)
            tokens = seen.hidden_states[self._spec.default_feature_layer][:, -own[0] * own[1] :].float()
        grid = self.norm(tokens.transpose(1, 2).unflatten(2, own))
        grid = F.pad(grid, (0, columns - own[1], 0, rows - own[0]))
        return OrderedDict((str(number), level(grid)) for number, level in enumerate(self.levels))


def _smooth(dim: int, width: int) -> list[nn.Module]:
    return [
        nn.Conv2d(dim, width, 1, bias=False),
        LayerNorm2d(width),
        nn.Conv2d(width, width, 3, padding=1, bias=False),
        LayerNorm2d(width),
    ]
