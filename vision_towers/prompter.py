"""CLOC's Prompter: image tokens and a prompt in, one embedding out (Chen et al., arXiv 2410.02746, Sec. 3.3).

One transformer layer over [prompt tokens ; image tokens], averaged, whatever the prompt is: a box or a text. The
image's part of the attention does not depend on the prompt, so it is computed once and shared by all prompts of an
image. For an image token with scores s_j to the image and u_p to the prompt's tokens::

    out = (Z a + sum_p exp(u_p) v_p) / (Z + sum_p exp(u_p)),    Z = sum_j exp(s_j),  a = sum_j exp(s_j) v_j / Z

which is the softmax over all of them, exactly. What remains for each prompt is the MLP on every image token. Scores and
their logarithms are in float32 at least: an error of log Z is one of all weights of a row.
"""

import torch
from torch import Tensor, nn

from .positions import CODE_SIZE, sinusoidal_2d

POOLS = ("image", "prompt", "all")
# Prompts of an image that are computed together, each as large as the image's tokens. Without gradients no more are in
# memory; with them those of all chunks are, for the backward pass.
CHUNK = 16


class Prompter(nn.Module):
    """Box or text prompts over the tokens of an image.

    Args:
        width: D, of the image tokens.
        text_dim: width of a text embedding (the joint space).
        num_heads: the paper has 1.
        pool: what is averaged: "image" tokens (ours by default; the paper says global average), "prompt" tokens, "all".
        add_token_pos: add the code of a patch's position to its token, the code that boxes are written in. Not in the
            paper; without it the tokens of a rotary tower carry almost no absolute position: no box could be found.

    Not in the paper, and ours: LayerNorm on the image tokens, pre-norm, an MLP of 4 D with GELU, two tokens a box (one
    a corner) with a learned code of which corner it is, a linear map from the position's code to D, another from text
    to D.
    """

    def __init__(self, width: int, text_dim: int, num_heads: int = 1, pool: str = "image", add_token_pos: bool = False):
        super().__init__()
        self.num_heads, self.pool, self.add_token_pos = num_heads, pool, add_token_pos
        self.token_norm = nn.LayerNorm(width)
        self.position = nn.Linear(CODE_SIZE, width)
        self.corner = nn.Parameter(torch.zeros(2, width))
        self.text = nn.Linear(text_dim, width)
        self.norm_1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm_2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def box_prompts(self, boxes: Tensor) -> Tensor:
        """Boxes `(B, R, 4)`, xyxy in 0..1 of the input, to prompt tokens `(B, R, 2, D)`."""
        corners = sinusoidal_2d(boxes.unflatten(-1, (2, 2)).float())
        return self.position(corners.to(self.position.weight.dtype)) + self.corner

    def text_prompts(self, texts: Tensor) -> Tensor:
        """Text embeddings `(B, R, text_dim)` to prompt tokens `(B, R, 1, D)`."""
        return self.text(texts)[:, :, None]

    def forward(self, tokens: Tensor, centres: Tensor, prompts: Tensor) -> Tensor:
        """One embedding a prompt, `(B, R, D)`.

        Args:
            tokens: `(B, N, D)` image tokens. centres: `(N, 2)` where they are, x and y in 0..1.
            prompts: `(B, R, P, D)` of `box_prompts` or `text_prompts`.
        """
        image = self.token_norm(tokens)
        if self.add_token_pos:
            image = image + self.position(sinusoidal_2d(centres.float()).to(image.dtype))
        q, k, v = self._heads(image)
        with torch.autocast(tokens.device.type, enabled=False):
            scores = _scores(q, k)  # (B, H, N, N)
            normaliser = scores.logsumexp(-1)  # log Z
            attended = (scores - normaliser[..., None]).exp().to(v.dtype) @ v  # a
        chunks = prompts.split(CHUNK, dim=1)
        return torch.cat([self._chunk(chunk, image, (q, k, v), attended, normaliser) for chunk in chunks], dim=1)

    def _chunk(
        self,
        prompts: Tensor,
        image: Tensor,
        image_qkv: tuple[Tensor, Tensor, Tensor],
        attended: Tensor,
        normaliser: Tensor,
    ) -> Tensor:
        image_q, image_k, image_v = (part[:, None] for part in image_qkv)  # (B, 1, H, N, d)
        q, k, v = self._heads(prompts)  # (B, R, H, P, d)
        pooled, count = prompts.new_zeros(()), 0
        if self.pool != "prompt":
            with torch.autocast(prompts.device.type, enabled=False):
                to_prompt = _scores(image_q, k)  # u, (B, R, H, N, P)
                total = torch.logaddexp(normaliser[:, None], to_prompt.logsumexp(-1))[..., None]
                mixed = (normaliser[:, None, ..., None] - total).exp() * attended[:, None]
                mixed = (mixed + (to_prompt - total).exp().to(v.dtype) @ v).to(v.dtype)
            pooled = pooled + self._rest(image[:, None], mixed).sum(-2)
            count += image.shape[-2]
        if self.pool != "image":
            scores = torch.cat([q @ k.transpose(-1, -2), q @ image_k.transpose(-1, -2)], dim=-1)
            weights = scores.softmax(-1)
            here, there = weights.split([prompts.shape[-2], image.shape[-2]], dim=-1)
            pooled = pooled + self._rest(prompts, here @ v + there @ image_v).sum(-2)
            count += prompts.shape[-2]
        return pooled / count

    def _heads(self, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (scaled), keys and values of `states (..., n, D)`, each `(..., H, n, d)`."""
        q, k, v = self.qkv(self.norm_1(states)).unflatten(-1, (3, self.num_heads, -1)).unbind(-3)
        q, k, v = (part.transpose(-2, -3) for part in (q, k, v))
        return q * q.shape[-1] ** -0.5, k, v

    def _rest(self, states: Tensor, attended: Tensor) -> Tensor:
        """The layer after its attention: `states (..., n, D)`, `attended (..., H, n, d)`."""
        states = states + self.out(attended.transpose(-2, -3).flatten(-2))
        return states + self.mlp(self.norm_2(states))


def _scores(q: Tensor, k: Tensor) -> Tensor:
    dtype = torch.promote_types(q.dtype, torch.float32)
    return q.to(dtype) @ k.to(dtype).transpose(-1, -2)


class BoxHead(nn.Sequential):
    """CLOC's 2-layer MLP from a Prompter's embedding `(..., D)` to a box `(..., 4)`, xyxy in 0..1 (Sec. 3.3).

    The sigmoid at its end is ours; the paper does not say how the numbers are kept in range.
    """

    def __init__(self, width: int):
        super().__init__(nn.Linear(width, width), nn.GELU(), nn.Linear(width, 4), nn.Sigmoid())


def in_unit_square(boxes: Tensor, input_hw: tuple[int, int]) -> Tensor:
    """Boxes `(..., 4)` in pixels of an input to 0..1 of it."""
    height, width = input_hw
    return boxes / boxes.new_tensor([width, height, width, height])
