"""Tags as several labels at once: a sigmoid over a sample of all tags, which every process shares.

With r_i of length 1 for an image, region or mask, n_c for the text of tag c, T_i the tags of i, C the sampled tags::

    L = 1/R sum_i sum_{c in C} BCE( s r_i.n_c + b, [c in T_i] )

C holds every tag that occurs in the batches of all processes, and `negatives` others drawn at random (a "federated"
loss, as RegionCLIP on a ViT in CLIPSelf's code: summed over classes, averaged over regions). The softmax of InfoNCE
would not do: one tag occurs many times in a batch, and a region has several.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

NO_TAG = -1


class TagOutput(NamedTuple):
    """loss: scalar; its mean over processes is L, and so is the gradient that data parallelism averages.
    correct: (R_w,) bool, for each row of this process that has tags, whether its nearest tag is one of its own."""

    loss: Tensor
    correct: Tensor


def sampled_tags(
    tags: Tensor, bank_size: int, negatives: int, seed: Tensor, group: dist.ProcessGroup | None = None
) -> Tensor:
    """The tags C of a step, `(S,)` int64, ascending and the same in every process of `group`.

    Args:
        tags: any shape, int64, the tags of this process's batch; NO_TAG is padding.
        bank_size: how many tags there are. negatives: how many that are in no process's batch are drawn (fewer, when
            there are fewer).
        seed: scalar int64 of the draw; the first process's counts. As it comes with the batch, the draw depends on
            the batch alone: a resumed run draws the same, and so does another number of processes.
    """
    if not bank_size:
        return torch.zeros(0, dtype=torch.int64, device=tags.device)
    present = torch.zeros(bank_size + 1, dtype=torch.int32, device=tags.device)
    present[tags.flatten()] = 1  # padding, -1, falls on the last place
    present, seed = present[:bank_size].contiguous(), seed.clone()
    if group is not None:
        dist.all_reduce(present, dist.ReduceOp.MAX, group=group)
        dist.broadcast(seed, group=group, group_src=0)
    others = (present == 0).nonzero()[:, 0]
    order = torch.randperm(len(others), generator=torch.Generator().manual_seed(int(seed)))
    drawn = others[order[:negatives].to(others.device)]
    return torch.cat([present.nonzero()[:, 0], drawn]).sort().values


def tags_in_sample(tags: Tensor, sample: Tensor, bank_size: int) -> Tensor:
    """`(R, S)` bool: which tags of `sample (S,)` are among each row's `tags (R, K)`; NO_TAG is padding."""
    place = torch.full((bank_size + 1,), len(sample), device=tags.device)
    place[sample] = torch.arange(len(sample), device=tags.device)
    held = torch.zeros(len(tags), len(sample) + 1, dtype=torch.bool, device=tags.device)
    return held.scatter_(1, place[tags], True)[:, :-1]


def tag_loss(
    embeds: Tensor,
    tag_embeds: Tensor,
    own: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    group: dist.ProcessGroup | None = None,
) -> TagOutput:
    """The loss over the rows of all processes of `group` (None: this one alone) that have a tag.

    Args:
        embeds: `(R_w, J)`, tag_embeds: `(S, J)`, any scale; S the same in every process.
        own: `(R_w, S)` bool, the tags of each row. A row without any is left out: its tags are unknown, not absent.
        logit_scale: log of s, without the bound that CLIP sets to its own (SigLIP has none). logit_bias: b. Of one
            element each.

    Computed in float32 at least, whatever the input and autocast say.
    """
    with torch.autocast(embeds.device.type, enabled=False):
        dtype = torch.promote_types(embeds.dtype, torch.float32)
        seen, named = F.normalize(embeds.to(dtype), dim=-1), F.normalize(tag_embeds.to(dtype), dim=-1)
        scale, bias = logit_scale.to(dtype).reshape(()).exp(), logit_bias.to(dtype).reshape(())
        logits = scale * seen @ named.T + bias
        counted = own.any(dim=1)
        total = counted.sum()
        if group is not None:
            dist.all_reduce(total, group=group)
        rows = F.binary_cross_entropy_with_logits(logits[counted], own[counted].to(dtype), reduction="sum")
        processes = 1 if group is None else group.size()
        # Touches everything, so that what has no row here still has a gradient.
        loss = rows / total.clamp(min=1) * processes + 0.0 * (seen.sum() + named.sum() + scale + bias)
        if not own.shape[1]:
            return TagOutput(loss, torch.zeros(0, dtype=torch.bool, device=own.device))
        nearest = logits.detach().argmax(dim=1, keepdim=True)
        return TagOutput(loss, own.gather(1, nearest)[counted, 0])
