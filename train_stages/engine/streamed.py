"""Data that is read in order, without a known length, by several processes and from any place on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, Generic, NamedTuple, TypeVar

from torch.utils.data import Dataset, Sampler

from ...vision_towers.errors import UserError
from .interrupt import heed_parent_alone
from .refusals import refused_as_value
from .seeded_data import SeededBatch, generators_put_back, mixed_seed, seed_generators

Example = TypeVar("Example")


class StreamedDataset(Dataset, ABC, Generic[Example]):
    """What a stage streams.

    Examples are small (annotations, a file name, encoded bytes) and are read by the training process itself, so that
    the order does not depend on the number of workers, and a resumed run can pass over them quickly. Items are made of
    them (decoding, crops) by the workers.
    """

    @abstractmethod
    def examples(self, rank: int, processes: int) -> Iterator[Example]:
        """The examples of process `rank`, without end, the same ones at every call."""

    def examples_from(self, first: int, rank: int, processes: int) -> Iterator[Example]:
        """Those from number `first` on. To be replaced where they are found faster than by passing over the others."""
        return islice(self.examples(rank, processes), first, None)

    @abstractmethod
    def item(self, example: Example) -> Any | None:
        """The item, with the global random generators seeded; None for one that cannot be used after all. The place of
        such a one is taken by another item of its batch."""


class _Placed(NamedTuple):
    """place: of the example in the training run, over all processes."""

    place: int
    example: Any


class StreamSampler(Sampler[_Placed]):
    """The examples of one process from number `first` on."""

    def __init__(self, stream: StreamedDataset, first: int, rank: int, processes: int) -> None:
        self._stream, self._first, self._rank, self._processes = stream, first, rank, processes

    def __iter__(self) -> Iterator[_Placed]:
        examples = self._stream.examples_from(self._first, self._rank, self._processes)
        for number, example in enumerate(examples, start=self._first):
            yield _Placed(number * self._processes + self._rank, example)


class SeededStream(Dataset):
    """The items of a stream, whose randomness depends on (seed, place) alone."""

    def __init__(self, stream: StreamedDataset, seed: int) -> None:
        self.stream, self._seed = stream, seed

    @refused_as_value
    def __getitems__(self, batch: Sequence[_Placed]) -> SeededBatch:
        """torch's loader asks for a whole batch here."""
        heed_parent_alone()
        key = mixed_seed(self._seed, 0, batch[0].place)
        with generators_put_back():
            items = [self._item(placed) for placed in batch]
        good = [item for item in items if item is not None]
        if not good:
            raise UserError("No image of a whole batch can be read; mend the data, or raise train.batch_size.")
        return SeededBatch(key + 1, [good[n % len(good)] if item is None else item for n, item in enumerate(items)])

    def _item(self, placed: _Placed) -> Any | None:
        seed_generators(mixed_seed(self._seed, 0, placed.place))
        return self.stream.item(placed.example)
