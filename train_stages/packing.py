"""Samples that share a row, as the row they make."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..mllm.processing import RegionLlavaProcessor
from .conversation_ids import IGNORED
from .mllm_data import Sample, batch_pictures
from .packed_attention import varlen_borders


def collate_packed(
    rows: Sequence[Sequence[Sample]],
    *,
    processor: RegionLlavaProcessor,
    pictures: Callable[[Sequence[Sample]], dict[str, torch.Tensor]] | None = None,
) -> dict[str, Any]:
    """All samples of all rows behind each other in one row without padding.

    Args:
        rows: of samples; how they are split into rows makes no difference here.
        pictures: what the model gets for the samples' pictures; `batch_pictures` when absent.
    Returns:
        `input_ids` and `labels`, int64 `(1, tokens)`; no first token of a sample is learned. The borders of samples,
        which the model must be made to heed (`packed_attention`): the five keys of `varlen_borders`. And what
        `pictures` gives, by default `pixel_values` `(pictures, 3, H, W)` (with tiles `(pictures, V_max, 3, H, W)`, and
        `image_sizes` `(pictures, 2)`), `boxes` `(pictures, R_max, 4)` and `region_counts` `(pictures,)`; the last two
        only when there is a region, the others only when there is a picture.
    """
    samples = [sample for row in rows for sample in row]
    batch: dict[str, Any] = {
        "input_ids": torch.tensor([[token for sample in samples for token in sample.ids]]),
        # A sample's first token must not be learned from the end of the sample before.
        "labels": torch.tensor([[label for sample in samples for label in (IGNORED, *sample.labels[1:])]]),
    }
    batch |= varlen_borders([len(sample.ids) for sample in samples])
    return batch | (batch_pictures(samples, processor) if pictures is None else pictures(samples))
