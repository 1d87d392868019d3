"""WebDataset shards: tar files in which an image and its region record (`NAME.jpg`, `NAME.json`) follow each other."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from ..vision_towers.errors import UserError
from .bad_records import BadRecord
from .importers.fields import one_sentence
from .record_io import RecordSet
from .records import Record

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "jp2", "avif")


def read_shard(path: str | Path, images: bool = True) -> Iterator[tuple[Record, bytes] | BadRecord]:
    """The records of a shard, each with the bytes of its image file; `image` becomes the file's name in the shard.

    path: also an address that fsspec reads ("https://...", "s3://...", "hf://...").
    images: without, they are passed over and the bytes are empty.
    Raises UserError when the file cannot be read as a tar, or webdataset is not installed.
    """
    try:
        import fsspec
        from webdataset.tariterators import group_by_keys, tar_file_expander
    except ImportError:
        raise UserError(
            "Shards are read by webdataset, which is not installed; pip install 'regiontower[stream]'."
        ) from None

    def wanted(name: str) -> bool:
        return images or name.lower().endswith(".json")

    try:
        with fsspec.open(str(path), "rb") as file:
            files = tar_file_expander([{"url": str(path), "stream": file}], select_files=wanted)
            for sample in group_by_keys(files):
                yield _record(Path(path).name, sample, images)
    except UserError:
        raise
    except Exception as error:  # tarfile, fsspec and webdataset raise all sorts of things on broken or absent files
        raise UserError(f"{path}: the shard cannot be read ({one_sentence(error).rstrip('.')}).") from error


def _record(shard: str, sample: dict, images: bool) -> tuple[Record, bytes] | BadRecord:
    name = f"{shard}: {sample['__key__']}"
    suffix = next((suffix for suffix in IMAGE_SUFFIXES if suffix in sample), None)
    if "json" not in sample or (images and suffix is None):
        return BadRecord(name, f"it has no {'image' if 'json' in sample else 'region record (.json)'}.")
    try:
        found = json.loads(sample["json"])
        if not isinstance(found, dict):
            raise ValueError("the region record is no JSON object")
        record = Record.model_validate_json(json.dumps({**found, "image": f"{sample['__key__']}.{suffix or 'image'}"}))
    except ValueError as error:
        return BadRecord(name, one_sentence(error))
    return record, sample[suffix] if suffix else b""


def write_shards(records: RecordSet, folder: str | Path, per_shard: int = 1000) -> list[Path]:
    """Records and their image files, untouched, as `folder/00000.tar`, ...; their paths.

    Raises UserError when an image file is missing or of no known kind, or webdataset is not installed.
    """
    try:
        from webdataset.writer import TarWriter
    except ImportError:
        raise UserError(
            "Shards are written by webdataset, which is not installed; pip install 'regiontower[stream]'."
        ) from None

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for start in range(0, len(records), per_shard):
        paths.append(folder / f"{start // per_shard:05d}.tar")
        # Time 0 in every entry: the same records give the same bytes.
        with TarWriter(str(paths[-1]), encoder=False, mtime=0) as tar:
            for place, record in enumerate(records.records[start : start + per_shard], start):
                source = records.image_path(record)
                suffix = source.suffix.lower().removeprefix(".")
                if not source.is_file() or suffix not in IMAGE_SUFFIXES:
                    raise UserError(
                        f"record of {record.image}: there is no image file {source.name} to put in a shard."
                    )
                name = f"{place:08d}"
                moved = record.model_copy(update={"image": f"{name}.{suffix}"})
                text = moved.model_dump_json(exclude_defaults=True).encode()
                tar.write({"__key__": name, suffix: source.read_bytes(), "json": text})
    return paths
