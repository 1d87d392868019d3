"""Files that are there whole or not at all, also after a power cut."""

import errno
import os
from pathlib import Path


def write_atomically(path: Path, text: str) -> None:
    """Write beside the target, then rename: a reader or a crash sees the old file or the new one, never half of one.

    The text is on the disk before its name is: a power cut could otherwise leave the name on an empty file.
    """
    beside = path.with_name(f".{path.name}.tmp")
    beside.write_text(text, encoding="utf-8")
    sync(beside)
    os.replace(beside, path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Wait until the bytes of a file, or the names in a folder, are on the disk.

    Nothing where a system has no such call (folders on some network disks, Windows).
    """
    if os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """`sync` of everything in a folder, then of itself."""
    for path in folder.rglob("*"):
        sync(path)
    sync(folder)
