"""One shard of a plan, labelled: written aside first, and moved to its place once it is whole."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
from PIL import Image
from safetensors.numpy import load_file, save_file

from ..bad_records import BadRecord
from ..images import ImageError
from ..record_io import RecordSet, load_record_image, read_records, write_records
from ..records import Record
from ..webdataset import write_shards
from .labeller import Labelled, Labeller, PassedOver
from .plan import FOLDER as PLAN

PARTS = ".parts"  # of shards that are not finished
DONE = "done"  # what was counted in each finished shard; such a file is written last
ROWS = "rows"  # what engines keep of regions
FORMATS = {"jsonl": "jsonl", "webdataset": "tar"}


@dataclass(frozen=True)
class ShardResult:
    """What came of a shard: records written and regions in them, images left out by reason, unreadable images."""

    index: int
    records: int
    regions: int
    passed_over: dict[str, int]
    bad: list[BadRecord]

    @property
    def images(self) -> int:
        """All of the shard."""
        return self.records + sum(self.passed_over.values()) + len(self.bad)

    @staticmethod
    def from_dict(fields: dict[str, Any]) -> ShardResult:
        """As `asdict(result)` and JSON leave it."""
        return ShardResult(**{**fields, "bad": [BadRecord(**row) for row in fields["bad"]]})


@dataclass(frozen=True)
class ShardPart:
    """A labelled shard that is not at its place yet. name: of its folder in `.parts`; every attempt has one of its own,
    so that processes of a killed run that live a little longer cannot spoil the next one."""

    name: str
    result: ShardResult

    @staticmethod
    def from_json(text: str) -> ShardPart:
        """As `json.dumps(asdict(part))` writes it."""
        fields = json.loads(text)
        return ShardPart(fields["name"], ShardResult.from_dict(fields["result"]))


def shard_path(folder: Path, index: int, form: str) -> Path:
    """Where a finished shard with records lies."""
    return folder / f"{index:05d}.{FORMATS[form]}"


def rows_path(folder: Path, index: int) -> Path:
    """Where the rows of a finished shard's regions lie."""
    return folder / ROWS / f"{index:05d}.safetensors"


def read_rows(folder: Path, index: int) -> np.ndarray:
    """The rows of a finished shard's regions, `(R, D)`."""
    return load_file(rows_path(folder, index))["rows"]


def finished_shards(folder: Path) -> list[ShardResult]:
    """The results of all finished shards, in order."""
    notes = sorted((folder / DONE).glob("[0-9]*.json"))
    return [ShardResult.from_dict(json.loads(path.read_text("utf-8"))) for path in notes]


def label_shard(
    folder: Path, index: int, form: str, labeller: Labeller, batch_size: int, on_images: Callable[[int], None]
) -> ShardPart:
    """Label the images of a shard and write it into the folder's `.parts`; `commit_shard` moves it.

    form: a key of `FORMATS`. on_images: is told how many images more are done.
    """
    part = folder / PARTS / f"{index:05d}-{uuid4().hex}"
    part.mkdir(parents=True)
    planned = read_records(folder / PLAN / f"{index:05d}.jsonl").records
    found: list[Labelled] = []
    passed_over: Counter[str] = Counter()
    bad: list[BadRecord] = []
    for batch in _decoded(planned, batch_size):
        sound = [(record, image) for record, image in batch if isinstance(image, Image.Image)]
        bad += [BadRecord(record.image, str(error)) for record, error in batch if isinstance(error, ImageError)]
        results = labeller.label([image for _, image in sound], [record for record, _ in sound]) if sound else []
        for result in results:
            if isinstance(result, PassedOver):
                passed_over[result.reason] += 1
            else:
                found.append(result)
        on_images(len(batch))
    _write(folder, part, index, form, found)
    regions = sum(len(each.record.regions) for each in found)
    return ShardPart(part.name, ShardResult(index, len(found), regions, dict(passed_over), bad))


def commit_shard(folder: Path, form: str, shard: ShardPart) -> None:
    """Move a labelled shard to its place. It counts as finished from the last step on, which is a rename; one that is
    broken off before is labelled again and replaces what stands there."""
    part, result = folder / PARTS / shard.name, shard.result
    rows = part / rows_path(folder, result.index).name
    if rows.exists():
        rows_path(folder, result.index).parent.mkdir(exist_ok=True)
        rows.replace(rows_path(folder, result.index))
    if result.records:
        target = shard_path(folder, result.index, form)
        (part / target.name).replace(target)
    note = part / "done.json"
    note.write_text(json.dumps(asdict(result), ensure_ascii=False), encoding="utf-8")
    (folder / DONE).mkdir(exist_ok=True)
    note.replace(folder / DONE / f"{result.index:05d}.json")
    shutil.rmtree(part)


def place_image(record: Record, folder: Path) -> Record:
    """The record with its absolute image as a path relative to `folder`."""
    return record.model_copy(update={"image": os.path.relpath(record.image, folder)})


def write_shard(records: Sequence[Record], part: Path, target: Path, form: str) -> None:
    """Write `records`, whose images are absolute, into the folder `part`, under the name of `target`, where they are to
    be moved."""
    if form == "jsonl":
        write_records(part / target.name, (place_image(record, target.parent) for record in records))
        return
    written = write_shards(RecordSet(target, target.parent, list(records)), part / "tar", per_shard=len(records))
    written[0].replace(part / target.name)


def _write(folder: Path, part: Path, index: int, form: str, found: list[Labelled]) -> None:
    if not found:
        return
    write_shard([each.record for each in found], part, shard_path(folder, index, form), form)
    rows = [each.rows for each in found if each.rows is not None]
    if rows:
        save_file({"rows": np.concatenate(rows)}, part / rows_path(folder, index).name)


def _decoded(records: Sequence[Record], batch_size: int) -> Iterator[list[tuple[Record, Image.Image | ImageError]]]:
    """Batches of images; the next one is decoded while the last one is labelled."""

    def decode(start: int) -> list[tuple[Record, Image.Image | ImageError]]:
        return [(record, _open(record)) for record in records[start : start + batch_size]]

    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(decode, 0)
        for start in range(0, len(records), batch_size):
            batch, ahead = ahead.result(), pool.submit(decode, start + batch_size)
            yield batch


def _open(record: Record) -> Image.Image | ImageError:
    try:
        return load_record_image(Path("/"), record)
    except ImageError as error:
        return error
