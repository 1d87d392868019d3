"""Stage 0 on more images than fit on a disk as decoded pixels: records and images are read as they come."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from ..mllm.boxes import ImageFrame
from ..vision_towers.errors import UserError
from .bad_records import ENOUGH, BadRecord, refuse_hopeless, refuse_too_many_bad
from .engine.streamed import StreamedDataset
from .images import ImageError
from .pixels import Fill, to_pixels
from .pretrain_items import ItemMaker, seeded_generator
from .record_io import load_record_image, stream_records
from .record_source import WEBDATASET, RecordSource
from .records import Record
from .webdataset import read_shard


class StreamedImage(NamedTuple):
    """A record and its image file: the bytes, or None when it lies where the record says, relative to `root`."""

    record: Record
    root: Path
    data: bytes | None


@dataclass(frozen=True)
class RecordStream:
    """The records of a source, file by file.

    seed, buffer: files are read in random order, and each record is drawn from the next `buffer` ones; other orders in
    every round.
    """

    source: RecordSource
    seed: int
    buffer: int

    def records(self) -> Iterator[Record]:
        """All records once, in the order of the files, without their images.

        Raises UserError when a file cannot be read or too many of its records are bad.
        """
        for path in tqdm(self._files(), desc="reading annotations", unit="file"):
            for image in _read(path, self.source, images=False):
                yield image.record

    def rounds(self, rank: int, processes: int) -> Iterator[StreamedImage]:
        """Images without end: those of process `rank`, round after round.

        With as many files as processes, or a multiple of it, a process reads its own files only; else all of them, and
        every `processes`-th record is its own.
        """
        try:
            from datasets import IterableDataset
            from datasets.distributed import split_dataset_by_node
        except ImportError:
            raise UserError(
                "Streaming needs datasets, which is not installed; pip install 'regiontower[stream]'."
            ) from None
        arguments = {"files": self._files(), "source": self.source}
        everything = IterableDataset.from_generator(_read_files, gen_kwargs=arguments)
        mine = split_dataset_by_node(everything.shuffle(self.seed, buffer_size=self.buffer), rank, processes)
        number = 0
        while True:
            mine.set_epoch(number)
            found = 0
            for row in mine:
                found += 1
                record = Record.model_validate_json(row["record"])
                yield StreamedImage(record, Path(row["root"]), row["data"])
            if not found:
                raise UserError(
                    f"{self._files()[0]}: there is no record for process {rank} of {processes} in the data."
                )
            number += 1

    def hash(self) -> str:
        """sha256 (hex) over the files' names and sizes in bytes: their contents may be too large to be read for it."""
        import fsspec

        digest = hashlib.sha256()
        for path in self._files():
            try:
                filesystem, place = fsspec.url_to_fs(path)
                size = filesystem.size(place)
            except Exception as error:
                raise UserError(f"{path}: the file cannot be read ({str(error).rstrip('.')}).") from error
            digest.update(f"{Path(path).name}\0{size}\n".encode())
        return digest.hexdigest()

    def _files(self) -> list[str]:
        return self.source.addresses()


class StreamedItems(StreamedDataset[tuple[StreamedImage, Any]]):
    """The items of a stream. Images that are of no use to the objective are passed over.

    side, fill: of the letterboxed square, see `to_pixels`.
    Raises UserError, in a run, when more than 1 % of the images cannot be read. Each loader process judges its own,
    from the first `ENOUGH` on.
    """

    def __init__(self, stream: RecordStream, maker: ItemMaker, side: int, fill: Fill):
        self._stream, self._maker, self._side, self._fill = stream, maker, side, fill
        self._decoded, self._bad = 0, []

    def examples(self, rank: int, processes: int) -> Iterator[tuple[StreamedImage, Any]]:
        """The images of process `rank`, without end, each with what its record says that the objective can use.

        Raises UserError when a file cannot be read, none of the records is for this process, or the first
        `_PATIENCE` images are of no use.
        """
        useful = False
        for number, image in enumerate(self._stream.rounds(rank, processes), 1):
            frame = ImageFrame.letterbox((image.record.width, image.record.height), self._side)
            known = self._maker.prepare(image.record, frame)
            if known is not None:
                useful = True
                yield image, known
            elif number >= _PATIENCE and not useful:
                raise UserError(f"{self._maker.nothing} (the first {number} images were looked at)")

    def item(self, example: tuple[StreamedImage, Any]) -> dict[str, Any] | None:
        """The image decoded and made an item of the objective; None when it cannot be read.

        Raises UserError when too many cannot.
        """
        image, known = example
        self._decoded += 1
        try:
            picture = load_record_image(image.root, image.record, data=image.data)
        except ImageError as error:
            self._bad.append(BadRecord(image.record.image, str(error)))
            tqdm.write(f"passed over: {error}")
            if self._decoded >= ENOUGH:  # a stream has no end at which to judge
                refuse_too_many_bad(image.root, self._bad, self._decoded)
            return None
        pixels, _ = to_pixels(picture, self._side, self._fill)
        return self._maker.item(torch.from_numpy(np.array(pixels)), known, seeded_generator())


_PATIENCE = 10_000  # images, before data that are of no use at all are given up


def _read_files(files: list[str], source: RecordSource) -> Iterator[dict[str, Any]]:
    """Rows as `datasets` wants them; it cuts `files` into the parts of the processes."""
    for path in files:
        for image in _read(path, source, images=True):
            text = image.record.model_dump_json(exclude_defaults=True)
            yield {"record": text, "root": str(image.root), "data": image.data}


def _read(path: str, source: RecordSource, images: bool) -> Iterator[StreamedImage]:
    """The good records of one file; the bad ones are named, too many of them stop the run."""
    bad: list[BadRecord] = []
    total = 0
    for item in _items(path, source, images):
        total += 1
        if isinstance(item, StreamedImage):
            yield item
        elif isinstance(item, BadRecord):
            bad.append(item)
            refuse_hopeless(Path(path), bad, total)
    refuse_too_many_bad(Path(path), bad, total)
    if bad:
        tqdm.write(f"{path}: {len(bad)} of {total} records are bad: " + "; ".join(f"{b.line}: {b.reason}" for b in bad))


def _items(path: str, source: RecordSource, images: bool) -> Iterator[Any]:
    root = Path(source.root) if source.root else Path(path).parent
    if source.format == WEBDATASET:
        for found in read_shard(path, images):
            yield found if isinstance(found, BadRecord) else StreamedImage(found[0], root, found[1])
        return
    for found in stream_records(path, source.format, source.root, source.check_images):
        yield StreamedImage(found, root, None) if isinstance(found, Record) else found
