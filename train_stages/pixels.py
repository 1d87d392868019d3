"""Decoded, letterboxed pixels kept on disk: images are decoded once, and training reads them through a memory map.

Decoding beside training halves its speed on a small machine; a cache of 112 px images is 37 kB an image.
"""

import hashlib
import json
import math
import multiprocessing
import os
import shutil
import uuid
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from ..mllm.boxes import ImageFrame, letterbox_image
from ..vision_towers.errors import UserError
from .images import ImageError, open_image
from .record_io import BadRecord, RecordSet, load_record_image, refuse_too_many_bad
from .records import Record
from .waiting import wait_until_filled

Fill = tuple[int, int, int]

CLIP_GREY: Fill = (123, 117, 104)  # the mean colour of CLIP's normalisation
_FORMAT = 1  # part of the key: raise it when the pixels' making changes
_WORKERS = 2
_POOL_FROM = 64  # images; below, starting processes costs more than it saves


def load_pixels(path: str | Path, side: int, fill: Fill = CLIP_GREY) -> tuple[np.ndarray, ImageFrame]:
    """Open, turn upright and letterbox one image: uint8 (3, side, side) RGB and the frame of its boxes.

    Raises ImageError, a UserError, when the file is no readable image.
    """
    return to_pixels(open_image(path), side, fill)


def to_pixels(image: Image.Image, side: int, fill: Fill = CLIP_GREY) -> tuple[np.ndarray, ImageFrame]:
    """Letterbox an upright image: uint8 (3, side, side) RGB and the frame of its boxes."""
    square, frame = letterbox_image(image, side, fill)
    return np.ascontiguousarray(np.asarray(square).transpose(2, 0, 1)), frame


@dataclass(frozen=True)
class PixelCache:
    """The pixels of a record set.

    pixels: uint8 (n, 3, side, side), a read-only memory map, or an array when no folder was given.
    frames: n frames, original pixels <-> `side` x `side` input.
    records: the n records, in the order of the record set; those whose image cannot be read are absent.
    bad: the absent ones, with the reason.
    """

    pixels: np.ndarray
    frames: list[ImageFrame]
    records: list[Record]
    bad: list[BadRecord]

    def __len__(self) -> int:
        return len(self.records)

    @staticmethod
    def build(
        record_set: RecordSet,
        side: int,
        cache_dir: str | Path | None = None,
        *,
        fill: Fill = CLIP_GREY,
        progress: bool = True,
    ) -> "PixelCache":
        """Decode every image of `record_set` once, or open what an earlier run decoded; without a folder, in memory.

        The folder's entry is keyed by the images' paths, sizes and times, by `side` and by `fill`, so a changed image
        is decoded again. Of several processes, which all have to call this, the first decodes into the folder and the
        others wait for it; in memory each has its own. An unreadable image, or one of another size than its record
        says, is a bad record; more than max(5, 1 %) of them, or nothing else, raise UserError, and so does a disk
        without room for all.
        """
        if cache_dir is None:
            array = np.empty((len(record_set), 3, side, side), dtype=np.uint8)
            good, bad = _decode_all(record_set, side, fill, progress, array)
            return _assemble(record_set, array, good, bad)
        folder = Path(cache_dir)
        entry = folder / f"pixels-{_key(record_set, side, fill)}.npy"
        index = entry.with_suffix(".json")
        if int(os.environ.get("RANK", "0")):  # torch.distributed may not be set up yet
            wait_until_filled(folder, index, kept="pixel")
        elif not index.exists():  # written last, so a broken-off build is built again
            folder.mkdir(parents=True, exist_ok=True)
            # A name of its own: processes of other machines may have the same number.
            part = entry.with_suffix(f".{uuid.uuid4().hex}.part")
            try:
                array = _new_array(part, (len(record_set), 3, side, side))
                good, bad = _decode_all(record_set, side, fill, progress, array)
                array.flush()
                part.replace(entry)
            finally:
                part.unlink(missing_ok=True)
            text = json.dumps({"good": good, "bad": [[record.line, record.reason] for record in bad]})
            part.write_text(text, encoding="utf-8")
            part.replace(index)
        held = json.loads(index.read_text(encoding="utf-8"))
        bad = [BadRecord(*row) for row in held["bad"]]
        return _assemble(record_set, np.load(entry, mmap_mode="r"), held["good"], bad)


def _new_array(path: Path, shape: tuple[int, ...]) -> np.memmap:
    """An array on the disk, whose room is taken now: a memory map finds a full disk by SIGBUS, without a word."""
    size = math.prod(shape)
    try:
        array = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape)
        if hasattr(os, "posix_fallocate"):
            with path.open("r+b") as file:
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    except OSError as error:
        free = shutil.disk_usage(path.parent).free
        raise UserError(
            f"{shape[0]} decoded pictures of {shape[-1]} px take {size / 1e9:.2f} GB in {path.parent}, and there are "
            f"{free / 1e9:.2f} ({error.strerror}); make room, or choose another folder: data.cache_dir."
        ) from error
    return array


def _assemble(record_set: RecordSet, pixels: np.ndarray, good: list[int], bad: list[BadRecord]) -> PixelCache:
    records = [record_set.records[row] for row in good]
    frames = [ImageFrame.letterbox((record.width, record.height), pixels.shape[-1]) for record in records]
    return PixelCache(pixels[: len(good)], frames, records, bad)


def _key(record_set: RecordSet, side: int, fill: Fill) -> str:
    digest = hashlib.sha256(repr((_FORMAT, side, fill)).encode())
    for record in record_set.records:
        path = record_set.image_path(record)
        stat = path.stat() if path.is_file() else None
        stamp = (str(path.absolute()), record.width, record.height, stat and (stat.st_size, stat.st_mtime_ns))
        digest.update(repr(stamp).encode())
    return digest.hexdigest()[:20]


def _decode_all(
    record_set: RecordSet, side: int, fill: Fill, progress: bool, array: np.ndarray
) -> tuple[list[int], list[BadRecord]]:
    """Fill `array` with the images that can be read, dense and in order; their indices, and the bad records."""
    good: list[int] = []
    bad: list[BadRecord] = []
    total = len(record_set)
    about = f"decoding images at {side} px" + (f" ({array.nbytes / 1e9:.1f} GB)" if array.nbytes > 1e9 else "")
    with tqdm(total=total, desc=about, unit="img", disable=not progress) as bar:
        for row, result in enumerate(_decoded(record_set, side, fill)):
            if isinstance(result, str):
                bad.append(BadRecord(record_set.records[row].image, result))
                refuse_too_many_bad(record_set.path, bad, total)
            else:
                array[len(good)] = result
                good.append(row)
            bar.update()
    if not good:
        raise UserError(f"{record_set.path}: no image of it can be read ({bad[0].reason if bad else 'it is empty'}).")
    return good, bad


def _decoded(record_set: RecordSet, side: int, fill: Fill) -> Iterator[np.ndarray | str]:
    jobs = [(record_set.root, record.image, record.width, record.height, side, fill) for record in record_set.records]
    if len(jobs) < _POOL_FROM:
        yield from map(_decode, jobs)
        return
    # Forked workers run nothing but Pillow and numpy; spawned ones would have to import torch.
    method = "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"
    with ProcessPoolExecutor(_WORKERS, mp_context=multiprocessing.get_context(method)) as pool:
        yield from pool.map(_decode, jobs, chunksize=16)


def _decode(job: tuple[Path, str, int, int, int, Fill]) -> np.ndarray | str:
    """The pixels, or why there are none."""
    root, image, width, height, side, fill = job
    record = Record(image=image, width=width, height=height)
    try:
        return to_pixels(load_record_image(root, record), side, fill)[0]
    except ImageError as error:
        return str(error)
