"""When a run is measured on data that it does not learn from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class HeldOut:
    """measure: the figures of the model as it is, which is in eval mode; every process calls it at the same step. It
    may draw random numbers: training does not see it. every: steps from one measurement to the next; the last step of
    a run is always measured, and nothing else when absent.
    """

    measure: Callable[[], dict[str, float]]
    every: int | None = None

    def due(self, step: int, last: bool) -> bool:
        return last or (self.every is not None and step % self.every == 0)
