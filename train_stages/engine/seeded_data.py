"""Data whose order and randomness depend on (seed, epoch, index) alone."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from .interrupt import heed_parent_alone
from .refusals import Refusal, refused_as_value


class EpochSampler(Sampler[int]):
    """A permutation of `range(length)` for every epoch, drawn from (seed, epoch): a resumed run finds its place."""

    def __init__(self, length: int, seed: int) -> None:
        self._length, self._seed, self._epoch = length, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(mixed_seed(self._seed, self._epoch, -1))
        yield from torch.randperm(self._length, generator=generator).tolist()


class SeededDataset(Dataset):
    """A map-style dataset whose items may use `random`, `numpy.random` and `torch` freely (crops, template choice).

    The generators are seeded from (seed, epoch, index) around every item and put back afterwards. Without that, an
    item would depend on how many items were loaded before it in this process, on the number of workers, and on the
    batches that a resumed run skips.
    """

    def __init__(self, dataset: Any, seed: int) -> None:
        self._dataset, self._seed, self._epoch = dataset, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch
        if hasattr(self._dataset, "set_epoch"):
            self._dataset.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Any:
        return self.__getitems__([index]).items[0]

    @refused_as_value
    def __getitems__(self, indices: Sequence[int]) -> SeededBatch:
        """torch's loader asks for a whole batch here: the generators are put aside once, not once per item."""
        heed_parent_alone()
        keys = [mixed_seed(self._seed, self._epoch, index) for index in indices]
        items = []
        with generators_put_back():
            for key, index in zip(keys, indices, strict=True):
                seed_generators(key)
                items.append(self._dataset[index])
        return SeededBatch(keys[0] + 1, items)


class SeededBatch(NamedTuple):
    """Items on their way to `SeededCollate`, and the seed of whatever it draws."""

    key: int
    items: list


class SeededCollate:
    """The collate function of a `SeededDataset`: seeds by the batch's key and hands the bare items on."""

    def __init__(self, collate: Callable[[list], Any]) -> None:
        self._collate = collate

    @refused_as_value
    def __call__(self, batch: Any) -> Any:
        if isinstance(batch, Refusal):
            return batch
        with generators_put_back():
            seed_generators(batch.key)
            return self._collate(batch.items)


@contextmanager
def generators_put_back() -> Iterator[None]:
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)


def seed_generators(key: int) -> None:
    random.seed(key)
    np.random.seed(key % 2**32)
    torch.default_generator.manual_seed(key)  # torch.manual_seed would also reseed every GPU


def mixed_seed(seed: int, epoch: int, index: int) -> int:
    """63 well-spread bits of the three numbers."""
    return int(np.random.SeedSequence([seed % 2**32, epoch, index + 1]).generate_state(1, np.uint64)[0]) >> 1
