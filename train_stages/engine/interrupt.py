"""Ctrl-C and SIGTERM end a run after the step at hand, with a checkpoint."""

from __future__ import annotations

import signal
import threading
from types import FrameType

EXIT_STATUS = 75  # EX_TEMPFAIL of sysexits.h: not finished, and the same command may be given again


class StageInterrupted(SystemExit):
    """The run was stopped from outside, has a checkpoint and can be resumed. Uncaught, Python exits with `EXIT_STATUS`.

    `str` gives the sentence that was printed.
    """

    def __init__(self, sentence: str) -> None:
        super().__init__(EXIT_STATUS)
        self.sentence = sentence

    def __str__(self) -> str:
        return self.sentence


class StopRequest:
    """Context in which the first SIGINT or SIGTERM only sets `requested`; the second one acts as usual.

    Outside the main thread signals cannot be caught; there the context does nothing.
    """

    def __init__(self) -> None:
        self.requested = False
        self._saved: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._saved[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        self._restore()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        self._restore()

    def _restore(self) -> None:
        while self._saved:
            number, handler = self._saved.popitem()
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]
