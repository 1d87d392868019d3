"""Mask proposals into segments that do not overlap (MaskFormer, arXiv 2107.06278, section 3.4)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .label_maps import VOID, PanopticMap


def merged(
    masks: Tensor,
    classes: Tensor,
    stuff: Sequence[bool],
    min_score: float,
    min_overlap: float,
    enlarge: Callable[[Tensor], Tensor] = lambda masks: masks,
) -> PanopticMap:
    """A panoptic map `(H, W)`.

    A proposal with the class c of the largest probability takes part when c is an object and p(c) >= `min_score`. A
    pixel goes to the proposal with the largest p(c) sigmoid(m), if that one's sigmoid(m) >= 0.5. A proposal that keeps
    less than `min_overlap` of its own pixels is dropped, with them. Proposals of one class of stuff become one segment.

    Args:
        masks: logits `(Q, rows, columns)`. classes: logits `(Q, C + 1)`, the last one of "no object".
        enlarge: mask logits of the K proposals that take part to pixels, `(K, H, W)`.
    """
    best, label = classes.softmax(-1).max(-1)
    kept = ((label < classes.shape[-1] - 1) & (best >= min_score)).nonzero()[:, 0]
    shares = enlarge(masks[kept] if len(kept) else masks[:1]).sigmoid()
    segment = torch.full(shares.shape[-2:], VOID, device=masks.device)
    if not len(kept):
        return PanopticMap(segment.cpu().numpy(), (), ())
    winner = (best[kept, None, None] * shares).argmax(0)
    kinds: list[int] = []
    places: dict[int, int] = {}  # of classes of stuff
    for place, number in enumerate(label[kept].tolist()):
        own = shares[place] >= 0.5
        seen = own & (winner == place)
        if not seen.any() or seen.sum() / own.sum() < min_overlap:
            continue
        at = places.get(number, len(kinds))
        if at == len(kinds):
            kinds.append(number)
            if stuff[number]:
                places[number] = at
        segment[seen] = at
    return PanopticMap(segment.cpu().numpy(), tuple(kinds), (False,) * len(kinds))
