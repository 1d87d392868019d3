"""Whether a checkpoint is whole: its files' sizes and checksums, written last and read before it is used."""

from __future__ import annotations

import json
import zipfile
import zlib
from pathlib import Path
from typing import Annotated

from pydantic import Field, TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open

from ..atomic_write import sync, sync_tree

DIGEST_FILE = "files.json"
_DIGEST = TypeAdapter(Annotated[dict[str, tuple[int, int]], Field(min_length=1)])  # file -> size, CRC-32


def write_digest(folder: Path) -> None:
    """Note size and CRC-32 of every file of a checkpoint, after all of them have reached the disk."""
    sync_tree(folder)
    digest = {str(path.relative_to(folder)): [path.stat().st_size, _crc32(path)] for path in _files(folder)}
    (folder / DIGEST_FILE).write_text(json.dumps(digest), encoding="utf-8")
    sync(folder / DIGEST_FILE)
    sync(folder)


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, in a few words; None when nothing is.

    One that an older version wrote has no checksums: its weights must be whole safetensors files and its pickles whole
    archives.
    """
    path = folder / DIGEST_FILE
    if not path.is_file():
        return next((f"{file.name} is damaged" for file in _files(folder) if not _whole(file)), None)
    try:
        digest = _DIGEST.validate_json(path.read_bytes())
    except ValidationError:
        return f"{DIGEST_FILE} is damaged"
    for name, (size, checksum) in digest.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size or _crc32(file) != checksum:
            return f"{name} is damaged"
    return None


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != DIGEST_FILE)


def _crc32(path: Path) -> int:
    checksum = 0
    with path.open("rb") as stream:
        while block := stream.read(1 << 22):
            checksum = zlib.crc32(block, checksum)
    return checksum


def _whole(path: Path) -> bool:
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt"):
                return True
        if path.suffix in (".pt", ".pth", ".bin"):
            with zipfile.ZipFile(path) as archive:
                return archive.testzip() is None
        if path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
    except (SafetensorError, zipfile.BadZipFile, json.JSONDecodeError, UnicodeDecodeError, OSError):
        return False
    return True
