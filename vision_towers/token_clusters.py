"""Patch tokens merged into clusters, and copied back: fewer tokens for the blocks of a ViT.

UMG-CLIP (arXiv 2401.06397) is said to be trained with a reduction of visual tokens by clustering, and how is not known
to us. This is density-peak clustering with k nearest neighbours (DPC-kNN), as others use it on tokens. With d_ij the
distance of tokens i and j, divided by sqrt(D) so that wide towers have densities of the same size::

    rho_i   = exp( -1/k sum_{j in kNN(i)} d_ij^2 )           density
    delta_i = min_{j: rho_j > rho_i} d_ij                    distance to the nearest denser token; to the farthest
                                                             token for the densest
    centres = the tokens of the largest rho_i delta_i        all others join their nearest centre
"""

from typing import NamedTuple

import torch
from torch import Tensor

NEIGHBOURS = 5  # k


class TokenClusters(NamedTuple):
    """cluster: `(B, P)` int64, the cluster of each token. count: M, how many clusters an image has."""

    cluster: Tensor
    count: int

    def merge(self, tokens: Tensor) -> Tensor:
        """`(B, P, D)` to the means of the clusters' members, `(B, M, D)`."""
        where = self.cluster[..., None].expand_as(tokens)
        sums = tokens.new_zeros(len(tokens), self.count, tokens.shape[-1]).scatter_add(1, where, tokens)
        sizes = torch.zeros_like(sums[..., :1]).scatter_add(
            1, self.cluster[..., None], torch.ones_like(tokens[..., :1])
        )
        return sums / sizes

    def unmerge(self, merged: Tensor) -> Tensor:
        """`(B, M, D)` to `(B, P, D)`: every token gets what its cluster has become."""
        return merged.gather(1, self.cluster[..., None].expand(-1, -1, merged.shape[-1]))


@torch.no_grad()
def cluster_tokens(tokens: Tensor, count: int, neighbours: int = NEIGHBOURS) -> TokenClusters:
    """Cluster the P tokens of each image by themselves. Of equally dense tokens the first one counts as denser.

    Args:
        tokens: `(B, P, D)`, numbers of a size of about 1: much larger ones make the density outweigh all distances.
        count: M, at least 1; P or more gives every token a cluster of its own.
        neighbours: k; at most P - 1 are taken.
    """
    batch, total, width = tokens.shape
    if count >= total:
        return TokenClusters(torch.arange(total, device=tokens.device).expand(batch, -1), total)
    points = tokens.float() / width**0.5
    distance = torch.cdist(points, points)
    itself = torch.eye(total, dtype=torch.bool, device=tokens.device)
    near = distance.masked_fill(itself, torch.inf).topk(min(neighbours, total - 1), largest=False).values
    log_density = -near.square().mean(-1)  # the order is rho's, and nothing underflows
    mine, other = log_density[:, :, None], log_density[:, None, :]
    earlier = torch.ones_like(itself).tril(-1)
    denser = (other > mine) | ((other == mine) & earlier)
    delta = distance.masked_fill(~denser, torch.inf).amin(-1)
    delta = torch.where(denser.any(-1), delta, distance.amax(-1))
    centres = (log_density + delta.log()).topk(count).indices  # the order of rho delta
    to_centres = distance.gather(2, centres[:, None].expand(-1, total, -1))
    cluster = to_centres.argmin(-1)
    # A centre is its own, also beside a centre just like it: no cluster is empty.
    own = torch.arange(count, device=tokens.device).expand(batch, -1)
    return TokenClusters(cluster.scatter(1, centres, own), count)
