"""Read and write region records: bad ones are skipped, counted and named, too many of them stop the run."""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from ..vision_towers.errors import UserError
from .bad_records import BadRecord, name_bad, refuse_too_many_bad, refuse_unusable, refuse_without_folder
from .images import MAX_PIXELS, ImageError, open_image
from .importers import NothingToImport, get_importer
from .importers.fields import one_sentence
from .records import Record

__all__ = [
    "BadRecord",
    "RecordSet",
    "data_hash",
    "load_record_image",
    "read_records",
    "refuse_too_many_bad",
    "stream_records",
    "write_records",
]


@dataclass(frozen=True)
class RecordSet:
    """The good records of a file. `root` is the folder that their `image` is relative to; `passed_over` counts sound
    items that no region record can hold; `sources` are all files that were read."""

    path: Path
    root: Path
    records: list[Record]
    bad: list[BadRecord] = field(default_factory=list)
    passed_over: int = 0
    sources: tuple[Path, ...] = ()

    def __len__(self) -> int:
        return len(self.records)

    def image_path(self, record: Record) -> Path:
        """Where the record's image lies (an absolute `image` stays as it is)."""
        return self.root / record.image

    def summary(self) -> str:
        """One line for the run: `178 records, 0 bad`, followed by the bad ones by name."""
        text = f"{len(self.records)} records, {len(self.bad)} bad"
        if self.passed_over:
            text += f", {self.passed_over} passed over (nothing in them for a region record)"
        return f"{text}: {name_bad(self.bad)}" if self.bad else text


def read_records(
    path: str | Path,
    format: str = "records",
    image_root: str | Path | None = None,
    check_images: bool = False,
    **options: Any,
) -> RecordSet:
    """Read a file of region records, or import one of another `format` (an importer's name).

    Images are relative to `image_root` when it is given, else to the folder of `path`; nothing else is tried.
    `check_images` opens and decodes every image: a missing or damaged one, or one whose size after EXIF transpose is
    not the record's `width` x `height`, makes its record bad. `options` go to the importer (`captions_path` of `coco`).
    Raises UserError when the file cannot be read, when it holds no good record, or when more than
    max(5, 1 % of all) records are bad: the first ten are named.
    """
    path = Path(path)
    root = path.parent if image_root is None else Path(image_root)
    if image_root is not None:
        refuse_without_folder(root)
    records: list[Record] = []
    bad: list[BadRecord] = []
    passed_over = 0
    for item in stream_records(path, format, root, check_images, **options):
        if isinstance(item, Record):
            records.append(item)
        elif isinstance(item, BadRecord):
            bad.append(item)
        else:
            passed_over += 1
    refuse_unusable(path, bad, len(records), passed_over)
    extra = (Path(value) for value in options.values() if isinstance(value, str | Path))
    return RecordSet(path, root, records, bad, passed_over, (path, *extra))


def stream_records(
    path: str | Path,
    format: str = "records",
    image_root: str | Path | None = None,
    check_images: bool = False,
    **options: Any,
) -> Iterator[Record | BadRecord | NothingToImport]:
    """The items of `read_records` one at a time, for files that do not fit in memory; the caller counts the bad ones
    (`bad_records.refuse_too_many_bad`). A JSONL is never held whole.
    """
    path = Path(path)
    root = path.parent if image_root is None else Path(image_root)
    try:
        items = get_importer(format)(path, root, **options)
    except TypeError as error:  # importers are generators: only a wrong option can fail here
        raise UserError(f"{path}: the format {format!r} does not take these options ({error}).") from None
    for label, item in items:
        if isinstance(item, NothingToImport):
            yield item
        elif isinstance(item, Exception):
            yield BadRecord(label, one_sentence(item))
        elif check_images and (reason := _image_fault(root, item)):
            yield BadRecord(label, reason)
        else:
            yield item


def merge_record_sets(sets: Sequence[RecordSet]) -> RecordSet:
    """Several files as one record set; images become absolute when the files have different roots."""
    if len({found.root for found in sets}) == 1:
        records = [record for found in sets for record in found.records]
    else:
        records = [
            record.model_copy(update={"image": str(found.image_path(record).absolute())})
            for found in sets
            for record in found.records
        ]
    return RecordSet(
        sets[0].path,
        sets[0].root,
        records,
        [bad for found in sets for bad in found.bad],
        sum(found.passed_over for found in sets),
        tuple(source for found in sets for source in found.sources or (found.path,)),
    )


def load_record_image(
    root: Path, record: Record, max_pixels: int = MAX_PIXELS, data: bytes | None = None
) -> Image.Image:
    """The record's image as upright RGB. root: folder that the record's `image` is relative to; data: the image file's
    bytes, when it lies in a shard instead. Raises ImageError, naming the record's image, when it cannot be opened or
    its size is not the record's `width` x `height`."""
    path = root / record.image
    if data is None and not path.is_file():
        raise ImageError(
            f"record of {record.image}: there is no such file under image_root {root}; image_root must be the folder "
            "that image paths start from."
        )
    try:
        image = open_image(path, max_pixels, data)
    except ImageError as error:
        raise ImageError(f"record of {record.image}: {error}") from None
    if image.size != (record.width, record.height):
        raise ImageError(
            f"record of {record.image}: the image is {image.width} x {image.height} after EXIF transpose, but the "
            f"record says {record.width} x {record.height}."
        )
    return image


def write_records(path: str | Path, records: Iterable[Record]) -> int:
    """Write one record a line, defaults left out, and return their number.

    The file appears whole or not at all: it is written beside `path` and renamed. Its folder is made when absent.
    Raises ValueError when a record was changed into an invalid one after it was made.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")
    count = 0
    try:
        with part.open("w", encoding="utf-8", newline="\n") as file:
            for record in records:
                line = record.model_dump_json(exclude_defaults=True)
                try:
                    Record.model_validate_json(line)
                except ValueError as error:
                    raise ValueError(f"record {count} ({record.image}): {one_sentence(error)}") from None
                file.write(line + "\n")
                count += 1
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    return count


def data_hash(source: RecordSet | str | Path) -> str:
    """sha256 (hex) that tells whether a run saw the same data, without reading any image: over the bytes of the
    annotation files, then, for each image in sorted order, the name as the record has it and the file's size in bytes
    (-1 when it is missing). A path is read as region records beside their images.
    """
    records = source if isinstance(source, RecordSet) else read_records(source)
    digest = hashlib.sha256()
    for source_file in records.sources or (records.path,):
        with source_file.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    for name in sorted({record.image for record in records.records}):
        image = records.root / name
        digest.update(f"\n{name}\0{image.stat().st_size if image.is_file() else -1}".encode())
    return digest.hexdigest()


def _image_fault(root: Path, record: Record) -> str | None:
    try:
        load_record_image(root, record)
    except ImageError as error:
        return str(error)
    return None
