"""How far a run is, when it ends, and what learning rate that means."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from ...vision_towers.errors import UserError
from ..train_config import TrainConfig

FIRST_FACTOR = 0.01  # warm-up starts here and not at 0: the check after step 1 needs a step that moves weights


@dataclass
class Clock:
    """Progress of a run by steps, by seconds, or by whichever is further.

    `elapsed` moves only in `tick`, so that everything derived from it (schedule, stop, progress bar) agrees within a
    step, and, with several processes, between them.
    """

    steps: int | None  # the step that ends the run
    seconds: float | None  # the training time that ends it
    step: int = 0
    elapsed: float = 0.0
    _started: float | None = None
    _before: float = 0.0  # seconds spent by the runs this one resumes

    def start(self) -> None:
        """Training starts now (again); what was spent before stays counted."""
        self._before, self._started = self.elapsed, time.monotonic()

    def now(self) -> float:
        """Seconds of training so far, read from the wall clock."""
        return self.elapsed if self._started is None else self._before + time.monotonic() - self._started

    @contextmanager
    def pause(self) -> Iterator[None]:
        """What happens in here is not training: its time is not counted."""
        began = time.monotonic()
        try:
            yield
        finally:
            if self._started is not None:
                self._started += time.monotonic() - began

    def tick(self, step: int, elapsed: float) -> None:
        self.step, self.elapsed = step, elapsed

    def progress(self, step: int | None = None) -> float:
        """Share of the run that lies behind, 0 to 1, seen from the middle of step `step` (0-based; default: now).

        By steps it is strictly between 0 and 1 for every step of the run, so that no step has learning rate 0.
        """
        step = self.step if step is None else step
        shares = []
        if self.steps:
            shares.append((step + 1) / (self.steps + 1))
        if self.seconds:
            shares.append(self.elapsed / self.seconds)
        return min(1.0, max(shares))

    def done(self) -> bool:
        """Whether the run has reached its last step or spent its time."""
        by_steps = self.steps is not None and self.step >= self.steps
        return by_steps or (self.seconds is not None and self.elapsed >= self.seconds)

    def remaining(self) -> float | None:
        """Estimated seconds until the end; None before there is anything to estimate from."""
        if self.seconds is not None and (self.steps is None or self.elapsed / self.seconds >= self.step / self.steps):
            return max(0.0, self.seconds - self.elapsed)
        if not self.steps or not self.step:
            return None
        return self.elapsed / self.step * (self.steps - self.step)


def plan_steps(train: TrainConfig, samples: int | None, processes: int) -> int | None:
    """The step that ends the run by `steps` or `epochs` (the smaller), or None when only `minutes` ends it.

    Args:
        samples: length of the dataset; None for one without a length.

    Raises:
        UserError: the dataset is empty, or `epochs` is asked of a dataset without a length.
    """
    limits = [train.steps] if train.steps is not None else []
    if samples is not None and samples == 0:
        raise UserError("The training data is empty: nothing is left after the recipe's filters.")
    if train.epochs is not None:
        if samples is None:
            raise UserError("train.epochs needs a dataset with a length; set train.steps or train.minutes instead.")
        share = train.batch_size * processes
        batches = samples // share if samples >= share else 1
        limits.append(math.ceil(train.epochs * math.ceil(batches / train.grad_accum)))
    return min(limits) if limits else None


def lr_factor(schedule: str, warmup: float, progress: float) -> float:
    """Multiplier of the peak learning rate: linear warm-up, then cosine or linear to 0, or constant."""
    if progress < warmup:
        return max(FIRST_FACTOR, progress / warmup)
    share = (progress - warmup) / (1.0 - warmup)
    if schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * share))
    return 1.0 - share if schedule == "linear" else 1.0


def lr_lambda(train: TrainConfig, clock: Clock) -> Callable[[int], float]:
    """For `torch.optim.lr_scheduler.LambdaLR`: step -> multiplier."""
    return lambda step: lr_factor(train.schedule, train.warmup, clock.progress(step))
