"""Batches that take no more than a budget of padded tokens, on the average."""

import random
from collections.abc import Sequence

from regiontower.train_stages.grouped_batches import group_batches

_DRAWS = 2000


def random_padded(lengths: Sequence[int], batch: int) -> float:
    """Padded tokens of a batch of `batch` random samples, on the average."""
    rng = random.Random(0)
    return sum(batch * max(rng.sample(lengths, batch)) for _ in range(_DRAWS)) / _DRAWS


def grouped(lengths: Sequence[int], batch: int) -> list[list[int]]:
    """Indices of batches of like lengths; what makes no whole batch is left out."""
    whole = len(lengths) - len(lengths) % batch
    return group_batches(lengths[:whole], [True] * whole, batch, random.Random(0))


def grouped_padded(lengths: Sequence[int], batch: int) -> float:
    """Padded tokens of a batch of like lengths, on the average."""
    batches = grouped(lengths, batch)
    return sum(batch * max(lengths[index] for index in members) for members in batches) / len(batches)


def grouped_within(lengths: Sequence[int], budget: int) -> int:
    """Samples of the largest batch of like lengths whose average is within the budget; at least one."""
    most = min(len(lengths), int(budget * len(lengths) / sum(lengths)))
    return next((batch for batch in range(most, 1, -1) if grouped_padded(lengths, batch) <= budget), 1)
