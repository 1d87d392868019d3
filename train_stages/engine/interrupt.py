"""Ctrl-C and SIGTERM end a run after the step at hand, with a checkpoint."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType

from torch.utils.data import get_worker_info

EXIT_STATUS = 75  # EX_TEMPFAIL of sysexits.h: not finished, and the same command may be given again
SAME_REQUEST = 2.0  # seconds: whoever signals a whole job reaches a process directly and through torchrun
_shielded: int | None = None  # process whose signals are already sorted out


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
    """Context in which a SIGINT or SIGTERM only sets `requested`. Those that follow within `SAME_REQUEST` seconds are
    the same request; a later one acts as usual.

    Outside the main thread signals cannot be caught; there the context does nothing.
    """

    def __init__(self) -> None:
        self.requested = False
        self._first = 0.0
        self._saved: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._saved[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        self._restore()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.requested:
            self.requested, self._first = True, now
        elif now - self._first > SAME_REQUEST:
            self._restore()
            signal.raise_signal(number)

    def _restore(self) -> None:
        while self._saved:
            number, handler = self._saved.popitem()
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]


def heed_parent_alone() -> None:
    """In a process of a data loader: only the training process may end it.

    A scheduler's SIGTERM reaches all processes of a job. A loader's process would die of it, and the training process,
    which is about to finish its step and to save, of that. Elsewhere, and where a signal does not tell who sent it
    (macOS, Windows), nothing happens.
    """
    global _shielded
    if _shielded == os.getpid() or get_worker_info() is None:
        return
    _shielded = os.getpid()
    if not hasattr(signal, "sigwaitinfo"):
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # threads that are started later inherit it

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)  # as torch's own handler of the parent's SIGTERM does

    threading.Thread(target=wait, daemon=True).start()
