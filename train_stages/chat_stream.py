"""A mixture as batches: encoded window by window, arranged, and decoded last."""

from __future__ import annotations

import math
import multiprocessing
import os
import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path

from tqdm import tqdm

from ..mllm.processing import RegionLlavaProcessor
from ..vision_towers.errors import UserError
from ..vision_towers.pack_rows import pack_rows
from .bad_records import BadRecord, name_bad, refuse_too_many_bad
from .chat_samples import Encoded, Unusable, encode, with_pixels
from .engine import StreamedDataset
from .engine.seeded_data import mixed_seed
from .grouped_batches import group_batches
from .images import ImageError
from .mixture import Mixture
from .mllm_data import Sample

Row = list[Encoded]  # samples that share a row; one, unless samples are packed
_MIXTURE = Path("the mixture")  # what messages about its samples name
_TRIED_WINDOWS = 2  # to learn how many samples share a row
_CHUNK = 16  # samples that a process encodes at a time


@dataclass
class Tally:
    """What became of the examples that were looked at."""

    seen: int = 0
    silent: int = 0
    bad: list[BadRecord] = field(default_factory=list)
    masked: list[BadRecord] = field(default_factory=list)

    def record(self, error: Unusable) -> None:
        """Count it."""
        if error.kind == "silent":
            self.silent += 1
        else:
            (self.bad if error.kind == "bad" else self.masked).append(BadRecord(error.name, error.reason))

    def refuse_too_many(self) -> None:
        """Raise UserError when more than max(5, 1 %) are bad, or masked (nothing of them is learned)."""
        refuse_too_many_bad(_MIXTURE, self.bad, self.seen)
        if len(self.masked) > max(5, self.seen / 100):
            raise UserError(
                f"of {len(self.masked)} of {self.seen} samples no token is learned, more than max(5, 1 %): "
                f"{name_bad(self.masked)}"
            )

    def summary(self) -> str:
        """One line."""
        text = f"{self.seen} samples, {len(self.bad)} bad, {len(self.masked)} masked, {self.silent} without a question"
        named = [*self.bad, *self.masked]
        return f"{text}: {name_bad(named)}" if named else text


class Windows:
    """The samples of a mixture, `size` at a time. The place of one that cannot be used is taken by another of its
    window.

    workers: processes that encode; with none, and for streamed sources, it is done here.
    Raises UserError, when it is read, for too many bad or masked samples.
    """

    def __init__(
        self,
        mixture: Mixture,
        processor: RegionLlavaProcessor,
        max_tokens: int,
        size: int,
        seed: int,
        workers: int = 0,
    ) -> None:
        self.mixture, self.processor, self.size = mixture, processor, size
        self._max_tokens, self._seed = max_tokens, seed
        self._workers = 0 if mixture.endless else workers
        self.tally = Tally()

    @contextmanager
    def encoders(self) -> Iterator[Executor | None]:
        """The processes that encode; None without any."""
        if not self._workers:
            yield None
            return
        # Forked ones have the processor and the sources already.
        method = "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"
        context = multiprocessing.get_context(method)
        with ProcessPoolExecutor(self._workers, context, _adopt, (self,)) as pool:
            yield pool

    def samples(self, window: int, pool: Executor | None = None) -> Iterator[Encoded | None]:
        """Those of one window as they are encoded; None for what cannot be used. A pool begins at once."""
        places = range(window * self.size, (window + 1) * self.size)
        found = map(self.encode, places) if pool is None else pool.map(_encode, places, chunksize=_CHUNK)
        return self._tallied(found)

    def encode(self, place: int) -> Encoded | Unusable:
        """The sample of a place, or why there is none."""
        try:
            rng = random.Random(mixed_seed(self._seed, 1, place))
            return encode(self.mixture[place], self.processor, self._max_tokens, rng)
        except Unusable as error:
            return error

    def _tallied(self, found: Iterable[Encoded | Unusable]) -> Iterator[Encoded | None]:
        for result in found:
            self.tally.seen += 1
            if isinstance(result, Unusable):
                self.tally.record(result)
                self.tally.refuse_too_many()
            yield None if isinstance(result, Unusable) else result

    def filled(self, window: int, samples: Sequence[Encoded | None]) -> list[Encoded]:
        """Without None, and as many as before. Raises UserError when nothing is left."""
        good = [sample for sample in samples if sample is not None]
        if not good:
            raise UserError(f"none of {self.size} samples in a row can be learned from ({self.tally.summary()}).")
        rng = self.rng(window)
        return [sample if sample is not None else rng.choice(good) for sample in samples]

    def rng(self, window: int) -> random.Random:
        """For the arrangement of a window."""
        return random.Random(mixed_seed(self._seed, 2, window))


class ChatStream(StreamedDataset[Row]):
    """The rows of a run: single samples, or packs.

    Every process arranges the same windows and takes every `processes`-th row, so the order of the whole run does not
    depend on how many there are.

    Args:
        arrange: (samples of a window, its generator, samples in a batch of all processes) -> rows, in order.
        by_count: rows of a window are as many as its samples, so a resumed run need not arrange those before it.
        batch: rows a process takes a step.
        picture: sample -> the same with its picture. Raises ImageError.
    """

    def __init__(
        self,
        windows: Windows,
        arrange: Callable[[list[Encoded], random.Random, int], list[Row]],
        *,
        by_count: bool,
        batch: int,
        picture: Callable[[Encoded], Sample] | None = None,
    ) -> None:
        self.windows, self._arrange, self._by_count, self._batch = windows, arrange, by_count, batch
        self.picture = picture or partial(with_pixels, processor=windows.processor)
        self._decoded, self._unreadable = 0, []

    def examples(self, rank: int, processes: int) -> Iterator[Row]:
        return self.examples_from(0, rank, processes)

    def examples_from(self, first: int, rank: int, processes: int) -> Iterator[Row]:
        """Row `first` of this process and those after it, without end."""
        skipped = first * processes
        window = skipped // self.windows.size if self._by_count else 0
        rows = self._rows(window, self._batch * processes)
        skipped -= window * self.windows.size
        passed = tqdm(range(skipped), "finding the place", unit="row", disable=self._by_count or not skipped)
        for _ in passed:
            next(rows)
        return islice(rows, rank, None, processes)

    def _rows(self, window: int, batch: int) -> Iterator[Row]:
        """All processes' rows from a window on. The next window is encoded a little with every row, not all at once
        while everything waits."""
        with self.windows.encoders() as pool:
            samples = list(self.windows.samples(window, pool))
            while True:
                rows = self._arrange(self.windows.filled(window, samples), self.windows.rng(window), batch)
                window += 1
                coming, samples = self.windows.samples(window, pool), []
                share = math.ceil(self.windows.size / len(rows))
                for row in rows:
                    yield row
                    samples += islice(coming, share)
                samples += coming

    def item(self, example: Row) -> list[Sample] | None:
        """With pictures; a sample whose picture cannot be read is left out."""
        found = []
        for sample in example:
            self._decoded += 1
            try:
                found.append(self.picture(sample))
            except ImageError as error:
                name = sample.picture.name if sample.picture is not None else "?"
                self._unreadable.append(BadRecord(name, str(error)))
                tqdm.write(f"passed over: {error}")
                refuse_too_many_bad(_MIXTURE, self._unreadable, self._decoded)
        return found or None


class SizedChatStream(ChatStream):
    """One whose epochs can be counted."""

    def __len__(self) -> int:
        """Rows an epoch; of packs, as the first windows have it."""
        size = self.windows.mixture.size
        if self._by_count:
            return size
        rows = 0
        for window in range(_TRIED_WINDOWS):
            samples = self.windows.filled(window, list(self.windows.samples(window)))
            rows += len(self._arrange(samples, self.windows.rng(window), self._batch))
        self.windows.tally = Tally()  # the run will look at them again
        return math.ceil(size * rows / (_TRIED_WINDOWS * self.windows.size))


def grouped(samples: list[Encoded], rng: random.Random, batch: int) -> list[Row]:
    """Batches of one modality and of like lengths."""
    lengths = [len(sample.ids) for sample in samples]
    shown = [sample.picture is not None for sample in samples]
    return [[samples[index]] for members in group_batches(lengths, shown, batch, rng) for index in members]


def packed(row_tokens: int) -> Callable[[list[Encoded], random.Random, int], list[Row]]:
    """Packs of at most `row_tokens` tokens, in random order."""
    return partial(_packed, row_tokens)


def _packed(row_tokens: int, samples: list[Encoded], rng: random.Random, batch: int) -> list[Row]:
    rows = [[samples[index] for index in row] for row in pack_rows([len(s.ids) for s in samples], row_tokens)]
    rng.shuffle(rows)
    return rows


def plain(samples: list[Encoded], rng: random.Random, batch: int) -> list[Row]:
    """As they come."""
    return [[sample] for sample in samples]


_adopted: Windows | None = None  # of a process that encodes


def _adopt(windows: Windows) -> None:
    global _adopted
    _adopted = windows
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()


def _end_with(parent: int) -> None:
    """A pool's process would outlive a training process that was killed, and wait for work for ever."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _encode(place: int) -> Encoded | Unusable:
    assert _adopted is not None
    return _adopted.encode(place)


def window_size(wanted: int, batch: int) -> int:
    """The next multiple of a batch of all processes."""
    return math.ceil(wanted / batch) * batch
