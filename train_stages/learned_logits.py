"""The output head runs where something is learned, and nowhere else."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from .conversation_ids import IGNORED


def learned_logits(batch: dict[str, Any], progress: float = 0.0) -> dict[str, Any]:
    """The batch with what makes transformers' causal language models leave out logits that no loss needs: those of
    pictures, questions and padding, which are most of a batch. The loss stays the same.

    Args:
        batch: holds `labels`, int64 `(B, tokens)`, `IGNORED` where nothing is learned. progress: is not looked at;
            `run_stage` gives it.
    Returns:
        `batch` with two more keys. `logits_to_keep`, int64 `(kept,)`: the positions, from left to right, at which the
        next token of any sample is learned; position 0 where nothing is learned, since the head has to run in every
        process. `shift_labels`, int64 `(B, kept)`: what is learned there, `IGNORED` where a sample learns nothing.
    """
    labels: torch.Tensor = batch["labels"]
    following = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
    kept = (following != IGNORED).any(0).nonzero()[:, 0]
    if not len(kept):
        kept = kept.new_zeros(1)
    return batch | {"logits_to_keep": kept, "shift_labels": following[:, kept]}
