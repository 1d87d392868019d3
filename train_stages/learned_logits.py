"""The output head runs where something is learned, and nowhere else."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from .conversation_ids import IGNORED


def learned_logits(batch: dict[str, Any], progress: float = 0.0) -> dict[str, Any]:
    """The batch with what makes transformers' causal language models leave out logits that no loss needs: those of
    pictures, questions and padding, which are most of a batch. The loss stays the same.

    batch: `labels` `(B, tokens)`. Added are `logits_to_keep`, the positions at which the next token of any sample is
    learned, and `shift_labels`, what is learned there.
    """
    labels: torch.Tensor = batch["labels"]
    following = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
    kept = (following != IGNORED).any(0).nonzero()[:, 0]
    if not len(kept):  # the head has to run in every process
        kept = kept.new_zeros(1)
    return batch | {"logits_to_keep": kept, "shift_labels": following[:, kept]}
