"""One run at a time writes into a folder."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from ...vision_towers.errors import UserError

LOCK = ".lock"
_held: set[Path] = set()  # by this process: some file systems (NFS) grant a process its own lock again
_held_lock = threading.Lock()


@contextmanager
def only_run(folder: Path) -> Iterator[None]:
    """Nobody else is in such a block of the same folder, on machines that share its file system. The lock ends with
    the process, however that ends; its empty file stays. A folder that is made here and stays empty is removed.

    Raises:
        UserError: another process is; or `folder` is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; give a folder for the shards.")
    taken = UserError(f"another run is writing into {folder}: wait for its end, or choose a new folder.")
    here = folder.resolve()
    with _held_lock:
        if here in _held:
            raise taken
        _held.add(here)
    try:
        made = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise taken from None
        try:
            yield
        finally:
            if made and [path.name for path in folder.iterdir()] == [LOCK]:
                (folder / LOCK).unlink()
                folder.rmdir()
            lock.release()
    finally:
        _held.discard(here)
