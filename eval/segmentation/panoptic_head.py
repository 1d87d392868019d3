"""Open-vocabulary panoptic segmentation: queries propose masks, and each mask is named by texts.

UMG-CLIP (arXiv 2401.06397) reports panoptic quality of a tuned frozen tower; its head is not known to us. Ours is a
small MaskFormer (Cheng et al., arXiv 2107.06278) whose classes are texts. For query q, with G the decoder's grid, f_q
and g_q two maps of the query, e the patches in the space of texts and n(x) = x / |x|,

    m_q = f_q . G                                                  mask logits
    z_q = n( sum_p sigmoid(m_qp) n(e_p) / sum_p sigmoid(m_qp) + R(q) ),    logits_qc = s z_q . n(t_c)
    logits_q0 = g_q                                                no object

R starts at 0: a mask is named by the patches under it, and training adds what helps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...vision_towers.positions import CODE_SIZE, grid_centres, sinusoidal_2d
from .decoder import PixelDecoder
from .semantic_head import LogScale, enlarged, zeros

LAYERS, HEADS = 2, 4


@dataclass(frozen=True)
class Proposals:
    """masks: logits `(B, Q, rows, columns)`. classes: logits `(B, Q, C + 1)`, the last one of "no object"."""

    masks: Tensor
    classes: Tensor


class PanopticHead(nn.Module):
    """dim: D of dense features. joint: J of the space. width: channels of the decoder, a multiple of 4. queries: Q."""

    def __init__(self, dim: int, joint: int, width: int, queries: int):
        super().__init__()
        self.decoder = PixelDecoder(dim, width)
        self.queries = nn.Parameter(torch.randn(queries, width))
        self.enter = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, width))
        self.places = nn.Linear(CODE_SIZE, width)
        layer = nn.TransformerDecoderLayer(width, HEADS, 4 * width, 0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerDecoder(layer, LAYERS, nn.LayerNorm(width))
        self.masks = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))
        self.nothing = nn.Linear(width, 1)
        self.residual = zeros(nn.Linear(width, joint))
        self.scale = LogScale()

    def forward(self, dense: Tensor, embeds: Tensor, pixels: Tensor, texts: Tensor) -> Proposals:
        """Proposals on a grid of 4 rows x 4 columns; the arguments are those of `SemanticHead.forward`."""
        grid = self.decoder(dense, pixels)
        places = self.places(sinusoidal_2d(grid_centres(*dense.shape[-2:], device=dense.device)))
        tokens = self.enter(dense.flatten(2).transpose(1, 2)) + places
        queries = self.layers(self.queries.expand(len(dense), -1, -1), tokens)
        masks = torch.einsum("bqw,bwyx->bqyx", self.masks(queries), grid)
        # What a mask is called shall not bend the mask: no gradient.
        shares = masks.detach().sigmoid().flatten(2)
        under = (
            shares @ enlarged(embeds, grid).flatten(2).transpose(1, 2) / shares.sum(-1, keepdim=True).clamp(min=1e-6)
        )
        named = self.scale() * F.normalize(under + self.residual(queries), dim=-1) @ texts.T
        return Proposals(masks, torch.cat([named, self.nothing(queries)], dim=-1))
