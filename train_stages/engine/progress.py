"""Progress on stderr: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from .run_log import LogRow
from .schedule import Clock

SECONDS_BETWEEN_LINES = 15.0


@dataclass
class ProgressReport:
    """Shows how far a run is: step, loss, samples/s and the time left.

    `stage` names the run; `samples_per_step` counts all processes. Use `start`, `step` after every optimizer step,
    `logged` with every log row, `stop` at the end (also after an exception: a live bar keeps the terminal otherwise).
    """

    stage: str
    clock: Clock
    samples_per_step: int
    console: Console
    _bar: Progress | None = None
    _loss: float | None = None
    _last_line: float = 0.0
    _first: tuple[int, float] = (0, 0.0)

    def start(self) -> None:
        self._first = (self.clock.step, self.clock.elapsed)
        self._last_line = time.monotonic()
        if self.console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(bar_width=None), TextColumn("{task.fields[status]}"))
            self._bar = Progress(*columns, console=self.console, transient=True)
            self._bar.add_task(self.stage, total=1.0, status="")
            self._bar.start()

    def logged(self, row: LogRow) -> None:
        self._loss = row.loss

    def step(self) -> None:
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=self._share(), status=self._status())
        elif time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            self.say(f"{self._share():4.0%}  {self._status()}")

    def say(self, text: str) -> None:
        """One line that stays, above the bar where there is one."""
        self.console.print(f"{self.stage}: {text}", markup=False, highlight=False, soft_wrap=True)

    def stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def summary(self) -> str:
        """What has been done so far: for the last line of a run."""
        return f"step {self.clock.step}, {duration(self.clock.elapsed)}" + self._numbers()

    def _share(self) -> float:
        return 1.0 if self.clock.done() else self.clock.progress() if self.clock.step else 0.0

    def _status(self) -> str:
        steps = f"step {self.clock.step}" + (f"/{self.clock.steps}" if self.clock.steps else "")
        left = self.clock.remaining()
        return steps + self._numbers() + (f"  {duration(left)} left" if left is not None else "")

    def _numbers(self) -> str:
        steps, seconds = self.clock.step - self._first[0], self.clock.elapsed - self._first[1]
        loss = f"  loss {self._loss:.4g}" if self._loss is not None else ""
        return loss + (f"  {steps * self.samples_per_step / seconds:.1f} samples/s" if seconds > 0 and steps else "")


def duration(seconds: float) -> str:
    """`75.2` -> `1:15`, `3700` -> `1:01:40`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
