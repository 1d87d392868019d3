"""Batches of samples that are alike, so that little of a batch is padding."""

from __future__ import annotations

import random
from collections.abc import Sequence


def group_batches(
    lengths: Sequence[int], with_picture: Sequence[bool], batch: int, rng: random.Random
) -> list[list[int]]:
    """Indices of `len(lengths)` samples, a multiple of `batch`, as batches in random order; every sample is in one.

    A batch holds samples of one modality (with a picture, or text alone) and of neighbouring lengths. What is left of
    both makes up one mixed batch, when it has to.

    Args:
        lengths: of each sample, tokens. with_picture: of each sample. batch: samples of all processes together.
        rng: is drawn from.
    Raises:
        ValueError: `len(lengths)` is no multiple of `batch`.
    """
    if len(lengths) % batch:
        raise ValueError(f"{len(lengths)} samples do not make whole batches of {batch}")
    batches: list[list[int]] = []
    left: list[int] = []
    for modality in (True, False):
        members = [index for index, shown in enumerate(with_picture) if shown == modality]
        rng.shuffle(members)  # what is left over is any of them
        whole = len(members) - len(members) % batch
        left += members[whole:]
        members = sorted(members[:whole], key=lambda index: lengths[index])
        batches += [members[start : start + batch] for start in range(0, whole, batch)]
    batches += [left] if left else []
    for members in batches:  # several processes share a batch: none of them always has the longest
        rng.shuffle(members)
    rng.shuffle(batches)
    return batches
