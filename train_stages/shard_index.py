"""WebDataset shards on a local disk, read sample by sample in any order."""

from __future__ import annotations

import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..vision_towers.errors import UserError
from .webdataset import IMAGE_SUFFIXES


@dataclass(frozen=True)
class ShardSample:
    """Places (start, length) in a shard: of a sample's annotation and of its image, None where there is none."""

    shard: Path
    key: str
    annotation: tuple[int, int] | None
    image: tuple[int, int] | None
    suffix: str = ""

    def annotation_bytes(self) -> bytes:
        """Raises ValueError when there is no annotation."""
        if self.annotation is None:
            raise ValueError("it has no region record or conversation (.json)")
        start, length = self.annotation
        with self.shard.open("rb") as file:
            file.seek(start)
            return file.read(length)


def index_shards(paths: Sequence[Path]) -> list[ShardSample]:
    """The samples of tar files that are not compressed, in the order of the files; only headers are read.

    Raises:
        UserError: a file that is no such tar.
    """
    return [sample for path in paths for sample in _samples(path)]


def _samples(path: Path) -> list[ShardSample]:
    found: dict[str, dict[str, tuple[int, int]]] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if not member.isfile():
                    continue
                folder, _, name = member.name.rpartition("/")
                stem, _, suffix = name.partition(".")  # as webdataset cuts names
                key = f"{folder}/{stem}" if folder else stem
                found.setdefault(key, {})[suffix.lower()] = (member.offset_data, member.size)
    except (OSError, tarfile.TarError) as error:
        raise UserError(f"{path}: the shard cannot be read ({str(error).rstrip('.')}).") from error
    return [_sample(path, key, files) for key, files in found.items()]


def _sample(path: Path, key: str, files: dict[str, tuple[int, int]]) -> ShardSample:
    suffix = next((suffix for suffix in IMAGE_SUFFIXES if suffix in files), "")
    return ShardSample(path, key, files.get("json"), files.get(suffix), suffix)
