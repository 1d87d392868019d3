"""Processes that wait for what the first one writes, because it may take it longer than a barrier waits."""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path

from ..vision_towers.errors import UserError

_SAID_AFTER, _SAID_AGAIN, _GIVEN_UP = 60.0, 600.0, 600.0  # seconds of waiting for the process that fills the cache


def wait_until_filled(
    folder: Path,
    filled: Path,
    *,
    kept: str = "feature",
    say: Callable[[str], None] | None = None,
    sleep: Callable[[float], None] = time.sleep,
    now: Callable[[], float] = time.monotonic,
) -> None:
    """Return when the first process has written `filled`, which may take it longer than a barrier waits.

    After a minute, and then every ten, one process of each machine says what it waits for.

    Args:
        folder: of the cache; the first process makes it when it begins. filled: the file that it writes at its end.
        kept: what the cache keeps, in the words of what is said.
        say: takes a line; stderr when absent. sleep, now: seconds, of a clock that does not go back.
    Raises:
        UserError: after ten minutes not even `folder` is here, so the first process writes to another disk.
    """
    began, next_word = now(), _SAID_AFTER
    while not filled.exists():
        waited = now() - began
        if waited >= _GIVEN_UP and not folder.exists():
            raise UserError(
                f"{folder} is not on {platform.node()} after {waited / 60:.0f} minutes, and the first process keeps "
                f"{kept}s in it; set data.cache_dir to a folder that all machines share."
            )
        if waited >= next_word:
            next_word += _SAID_AGAIN
            if os.environ.get("LOCAL_RANK", "0") == "0":
                (say or _to_stderr)(
                    f"{kept} cache: {platform.node()} has waited {waited / 60:.0f} min for {filled}, which the first "
                    "process writes when all pictures are kept; the folder has to be one that all machines share"
                )
        sleep(1)


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
