"""Which images a run labels, in which shard: decided once, before any model is loaded, and kept in the run's folder."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...vision_towers.errors import UserError
from ..bad_records import BadRecord, refuse_too_many_bad
from ..images import ImageError, image_size
from ..recipe import differences
from ..record_io import read_records, write_records
from ..records import Record
from ..webdataset import IMAGE_SUFFIXES
from .duplicates import DuplicateFinder, picture_hash
from .region_filters import is_longish

FOLDER = "plan"
SETTINGS = "settings.json"
FOUND = "found.json"
_CHUNK = 4096  # images whose headers are read, and hashes held, at once


@dataclass(frozen=True)
class ImageSource:
    """What is to be labelled. path: a folder of images (searched through), or with `format`, an importer's name, a file
    of records; image_root: folder that their images are relative to."""

    path: Path
    format: str | None = None
    image_root: Path | None = None


@dataclass(frozen=True)
class Plan:
    """folder: of a run. shards: number of them. images: in the shards. passed_over: images left out, by reason.
    bad: unreadable ones."""

    folder: Path
    shards: int
    images: int
    passed_over: dict[str, int]
    bad: list[BadRecord]

    @property
    def total(self) -> int:
        """All images that were looked at."""
        return self.images + sum(self.passed_over.values()) + len(self.bad)

    def shard(self, index: int) -> list[Record]:
        """The images of a shard, with absolute paths."""
        return read_records(self.folder / FOLDER / f"{index:05d}.jsonl").records


@dataclass(frozen=True)
class FoundImages:
    """What lies at a source. path: the source's. root: folder that images are relative to. items: names of images, or
    records, good and bad."""

    path: Path
    root: Path
    items: Sequence[str | Record | BadRecord]

    def sha256(self) -> str:
        """Over the names, or the whole records."""
        digest = hashlib.sha256()
        for item in self.items:
            text = item.model_dump_json(exclude_defaults=True) if isinstance(item, Record) else str(item)
            digest.update(f"{text}\n".encode())
        return digest.hexdigest()


def make_plan(
    found: FoundImages,
    folder: Path,
    settings: dict[str, Any],
    *,
    per_shard: int,
    near_duplicates: int | None,
    max_elongation: float,
    threads: int = 1,
) -> Plan:
    """Cut the images into shards of `per_shard`; or open the plan that an earlier run left.

    settings: of the run; what they say, and the images (by name; records, whole), must be as in the earlier run.
    near_duplicates: see `DuplicateFinder`; None keeps all. max_elongation: see `RunConfig`.
    Raises UserError for other settings or images, no usable image, or too many unreadable ones.
    """
    known = {"root": str(found.root), "images": len(found.items), "images_sha256": found.sha256()}
    wanted = json.loads(json.dumps({**settings, **known}))
    place = folder / FOLDER
    if not place.is_dir():
        images = _images(found, near_duplicates, max_elongation, threads)
        _write_plan(place, wanted, images, per_shard, found.path, len(found.items))
    elif changes := differences(json.loads((place / SETTINGS).read_text(encoding="utf-8")), wanted):
        listed = "; ".join(changes[:3])
        raise UserError(f"{folder} holds labels of another run ({listed}): choose a new folder or use --overwrite.")
    held = json.loads((place / FOUND).read_text(encoding="utf-8"))
    return Plan(folder, held["shards"], held["images"], held["passed_over"], [BadRecord(*row) for row in held["bad"]])


def find_images(source: ImageSource) -> FoundImages:
    """List the images of a folder, by name; or read the records.

    Raises:
        UserError: no such folder or file, nothing in it, or too many bad records.
    """
    path = Path(os.path.abspath(source.path))
    if source.format is not None:
        records = read_records(path, source.format, source.image_root)
        return FoundImages(source.path, Path(os.path.abspath(records.root)), [*records.records, *records.bad])
    if not path.is_dir():
        raise UserError(f"{source.path}: there is no such folder of images; for a file of records give its --format.")
    names = []
    for place, folders, files in os.walk(path):
        folders.sort()
        inside = Path(place).relative_to(path)
        names += [str(inside / name) for name in files if name.lower().rpartition(".")[2] in IMAGE_SUFFIXES]
    if not names:
        raise UserError(f"{source.path}: there is no image in this folder ({', '.join(IMAGE_SUFFIXES)}).")
    return FoundImages(source.path, path, sorted(names))


def _images(
    found: FoundImages, near_duplicates: int | None, max_elongation: float, threads: int
) -> Iterator[Record | BadRecord | str]:
    """A record with an absolute image, what is wrong with it, or the reason why it is left out."""
    finder = None if near_duplicates is None else DuplicateFinder(near_duplicates)

    def look(item: str | Record | BadRecord) -> tuple[Record | BadRecord | str, Any]:
        if isinstance(item, BadRecord):
            return item, None
        name = item if isinstance(item, str) else item.image
        path = found.root / name
        try:
            if isinstance(item, str):
                width, height = image_size(path)
                record = Record(image=str(path), width=width, height=height)
            else:
                record = item.model_copy(update={"image": str(path)})
            if is_longish(record.width, record.height, max_elongation):
                return "too thin", None
            return record, None if finder is None else picture_hash(path)
        except ImageError as error:
            return BadRecord(name, str(error)), None

    with ThreadPoolExecutor(threads) as pool:
        for start in range(0, len(found.items), _CHUNK):
            looked = list(pool.map(look, found.items[start : start + _CHUNK]))
            again = iter(finder.seen([code for _, code in looked if code is not None]) if finder else ())
            for item, code in looked:
                yield "near duplicate" if code is not None and next(again) else item


def _write_plan(
    place: Path,
    settings: dict[str, Any],
    images: Iterator[Record | BadRecord | str],
    per_shard: int,
    source: Path,
    total: int,
) -> None:
    """The plan appears whole, with its settings, or not at all."""
    part = place.with_name(f".{place.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    bad: list[BadRecord] = []
    passed_over: Counter[str] = Counter()
    waiting: list[Record] = []
    shards = count = 0
    for item in images:
        if isinstance(item, BadRecord):
            bad.append(item)
            refuse_too_many_bad(source, bad, total)
        elif isinstance(item, str):
            passed_over[item] += 1
        else:
            waiting.append(item)
            count += 1
        if len(waiting) == per_shard:
            write_records(part / f"{shards:05d}.jsonl", waiting)
            shards, waiting = shards + 1, []
    if waiting:
        write_records(part / f"{shards:05d}.jsonl", waiting)
        shards += 1
    if not shards:
        raise UserError(
            f"{source}: none of its {total} images can be used ({bad[0].reason if bad else next(iter(passed_over))})."
        )
    rows = [[record.line, record.reason] for record in bad]
    held = {"shards": shards, "images": count, "passed_over": passed_over, "bad": rows}
    (part / FOUND).write_text(json.dumps(held, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (part / SETTINGS).write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    part.rename(place)
