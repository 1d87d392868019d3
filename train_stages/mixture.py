"""Samples of several sources in one order that depends on the seed alone, and that can be taken up anywhere."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from .chat_samples import Example, Unusable
from .mixture_recipe import MixtureSource
from .mixture_sources import Examples, Joined, open_source, streamed_examples

_BLOCK = 4096  # places whose sources are drawn at once


class Mixture:
    """Place in the training run -> example.

    Without weights, the sources are one: every sample is drawn once a round, each round in another order. With weights,
    the source of a place is drawn first, and each source goes round by itself. Nothing is remembered but how far a
    streamed source was read, so any place can be asked for; a streamed source is read from its beginning to get there.

    Args:
        weights: of the sources, all or none. size: samples in all sources that are not streamed.
    """

    def __init__(self, sources: Sequence[Examples | Streamed], weights: Sequence[float] | None, seed: int) -> None:
        if weights is None:
            sources = [Joined([source for source in sources if not isinstance(source, Streamed)])]
        self._sources, self._seed = sources, seed
        self._shares = None if weights is None else np.array(weights) / sum(weights)
        self._drawn = [np.zeros(len(sources), dtype=np.int64)]  # of each source, before each block
        self.size = sum(len(source) for source in sources if not isinstance(source, Streamed))
        self.endless = any(isinstance(source, Streamed) for source in sources)

    def __getitem__(self, place: int) -> Example:
        """Raises Unusable for a broken one."""
        number, draw = self.whence(place)
        source = self._sources[number]
        if isinstance(source, Streamed):
            return source.draw(draw)
        turn, position = divmod(draw, len(source))
        return source[int(_order(len(source), self._seed, number, turn)[position])]

    def everything(self) -> Iterator[Example]:
        """Every example of the sources that are not streamed, once; broken ones are passed over."""
        for source in self._sources:
            for index in range(0 if isinstance(source, Streamed) else len(source)):
                try:
                    yield source[index]  # pyright: ignore[reportIndexIssue] - none of a stream's
                except Unusable:
                    continue

    def whence(self, place: int) -> tuple[int, int]:
        """The source of a place, and how many samples of that source come before."""
        if self._shares is None:
            return 0, place
        block, position = divmod(place, _BLOCK)
        while len(self._drawn) <= block:
            at = len(self._drawn) - 1
            counts = np.bincount(self._block(at), minlength=len(self._shares))
            self._drawn.append(self._drawn[at] + counts)
        chosen = self._block(block)
        number = int(chosen[position])
        return number, int(self._drawn[block][number] + (chosen[:position] == number).sum())

    def _block(self, block: int) -> np.ndarray:
        assert self._shares is not None
        return _sources_of(block, self._seed, tuple(self._shares))


class Streamed:
    """A source that is read in order: its examples by number, which had better not go back."""

    def __init__(self, source: MixtureSource, seed: int) -> None:
        self._source, self._seed = source, seed
        self._examples: Iterator[Example] | None = None
        self._last: tuple[int, Example] | None = None

    def __getstate__(self) -> dict:
        """Another process begins anew."""
        return self.__dict__ | {"_examples": None, "_last": None}

    def draw(self, number: int) -> Example:
        """Example `number` of its endless order."""
        if self._last is not None and number == self._last[0]:
            return self._last[1]
        if self._examples is None or (self._last is not None and number < self._last[0]):
            self._examples, self._last = streamed_examples(self._source, self._seed), None
        at = -1 if self._last is None else self._last[0]
        while at < number:
            at += 1
            self._last = at, next(self._examples)
        assert self._last is not None
        return self._last[1]


def open_mixture(sources: Sequence[MixtureSource], seed: int) -> Mixture:
    """Open every source.

    Raises:
        UserError: one that cannot be read.
    """
    opened = [Streamed(source, seed) if source.stream else open_source(source) for source in sources]
    weights = [source.weight for source in sources if source.weight is not None]
    return Mixture(opened, weights or None, seed)


def mixture_hash(sources: Sequence[MixtureSource]) -> str:
    """sha256 (hex) that tells whether a run sees the same data: over the sources' formats, and the names and sizes in
    bytes of their files. Neither annotations nor images are read."""
    digest = hashlib.sha256()
    for source in sources:
        digest.update(f"\n{source.format} {source.split}".encode())
        for address in source.addresses():
            path = Path(address)
            files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
            for file in files:
                digest.update(f"\n{file.name}\0{file.stat().st_size if file.is_file() else -1}".encode())
    return digest.hexdigest()


@lru_cache(maxsize=16)
def _order(size: int, seed: int, source: int, turn: int) -> np.ndarray:
    """Round `turn` of a source: a permutation of `range(size)`."""
    kind = np.int32 if size < 2**31 else np.int64
    return np.random.default_rng([seed % 2**32, source, turn]).permutation(size).astype(kind)


@lru_cache(maxsize=4)
def _sources_of(block: int, seed: int, shares: tuple[float, ...]) -> np.ndarray:
    return np.random.default_rng([seed % 2**32, 2**32 - 1, block]).choice(len(shares), _BLOCK, p=shares)
