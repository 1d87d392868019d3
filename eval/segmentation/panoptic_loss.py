"""The loss of mask proposals: each true segment teaches the proposal that fits it best, the others learn to be nothing.

As in MaskFormer (arXiv 2107.06278, section 3.3), with Mask2Former's weights (arXiv 2112.01527): for a one-to-one match
of the lowest cost,

    cost(q, g) = -2 p_q(c_g) + 5 BCE(m_q, m_g) + 5 dice(m_q, m_g)
    L = 2 CE(all q; "no object" counts 0.1) + mean over pairs of 5 BCE + 5 dice
    dice(m, g) = 1 - (2 sum m g + 1) / (sum m + sum g + 1)

Void pixels take part in neither BCE nor dice.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from .label_maps import VOID, PanopticMap
from .panoptic_head import Proposals

CLASS, BCE, DICE = 2.0, 5.0, 5.0
NO_OBJECT = 0.1


@dataclass(frozen=True)
class Targets:
    """Of one image: masks `(G, P)` float, classes `(G,)`, and which pixels are labelled `(P,)` float."""

    masks: Tensor
    classes: Tensor
    labelled: Tensor

    @classmethod
    def of(cls, truth: PanopticMap, device: torch.device) -> Targets:
        """Crowds are no one thing that a mask could propose: they are void here."""
        single = [place for place, crowd in enumerate(truth.crowd) if not crowd]
        segment = torch.from_numpy(truth.segment).to(device).flatten()
        masks = segment == torch.tensor(single, device=device, dtype=segment.dtype)[:, None]
        crowds = torch.tensor([place for place, crowd in enumerate(truth.crowd) if crowd], device=device)
        void = (segment == VOID) | torch.isin(segment, crowds)
        classes = torch.tensor([truth.classes[place] for place in single], device=device, dtype=torch.long)
        return cls(masks.float(), classes, (~void).float())


def panoptic_loss(found: Proposals, targets: list[Targets]) -> Tensor:
    """The loss of a batch; `targets` are on the grid of the proposals."""
    batch, queries, choices = found.classes.shape
    wanted = torch.full((batch, queries), choices - 1, device=found.classes.device)
    masks: list[Tensor] = []
    for image, target in enumerate(targets):
        logits = found.masks[image].flatten(1)
        rows, columns = match(logits, found.classes[image], target)
        wanted[image, rows] = target.classes[columns]
        pairs = logits[rows], target.masks[columns], target.labelled
        masks.append(BCE * mask_bce(*pairs).diagonal() + DICE * mask_dice(*pairs).diagonal())
    weights = torch.ones(choices, device=wanted.device)
    weights[-1] = NO_OBJECT
    loss = CLASS * F.cross_entropy(found.classes.flatten(0, 1), wanted.flatten(), weights)
    paired = torch.cat(masks)
    return loss + paired.sum() / max(1, len(paired))


@torch.no_grad()
def match(masks: Tensor, classes: Tensor, target: Targets) -> tuple[Tensor, Tensor]:
    """Proposals and the segments they are paired with, as places: mask logits `(Q, P)`, class logits `(Q, C + 1)`."""
    cost = -CLASS * classes.softmax(-1)[:, target.classes]
    pairs = masks, target.masks, target.labelled
    cost = cost + BCE * mask_bce(*pairs) + DICE * mask_dice(*pairs)
    rows, columns = linear_sum_assignment(cost.float().cpu().numpy())
    return torch.from_numpy(rows).to(masks.device), torch.from_numpy(columns).to(masks.device)


def mask_bce(logits: Tensor, masks: Tensor, labelled: Tensor) -> Tensor:
    """`(Q, G)`: the mean over labelled pixels of binary cross entropy; logits `(Q, P)`, masks `(G, P)`."""
    inside, outside = F.softplus(-logits) * labelled, F.softplus(logits) * labelled
    return (inside @ masks.T + outside @ (1 - masks).T) / labelled.sum().clamp(min=1)


def mask_dice(logits: Tensor, masks: Tensor, labelled: Tensor) -> Tensor:
    """`(Q, G)`: 1 - the smoothed dice coefficient over labelled pixels."""
    shares = logits.sigmoid() * labelled
    return 1 - (2 * shares @ masks.T + 1) / (shares.sum(-1)[:, None] + masks.sum(-1) + 1)
