"""A disk that takes no more: one sentence instead of a traceback from somewhere in a library."""

from __future__ import annotations

import errno
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from ...vision_towers.errors import UserError

# No space, over quota, file too large, read-only, input/output error.
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}
_OS_ERROR = re.compile(r"\(os error (\d+)\)")  # as Rust, in which safetensors is written, ends such a message


class StorageError(UserError, OSError):
    """The disk refused a file; everything that had been written before stands."""


@contextmanager
def storage_errors(run_dir: Path, last_good: Callable[[], Path | None]) -> Iterator[None]:
    """Turn a disk's refusal into `StorageError`; every other exception passes.

    last_good: the newest whole checkpoint, asked for only then.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if isinstance(error, UserError) or not _by_disk(error):
            raise
        kept = last_good()
        stands = f"{kept.name} is whole and kept" if kept is not None else "there was no checkpoint yet"
        reason = str(error).splitlines()[0]
        raise StorageError(
            f"{run_dir}: a file could not be written ({reason}); {stands}. Make room there and give the same command "
            "again."
        ) from error


def _by_disk(error: Exception) -> bool:
    if isinstance(error, OSError):
        return error.errno in _DISK
    number = _OS_ERROR.search(str(error))
    # torch writes archives itself and reports what the disk says as a bare RuntimeError.
    return int(number[1]) in _DISK if number else "PytorchStreamWriter" in str(error) or "unexpected pos" in str(error)
