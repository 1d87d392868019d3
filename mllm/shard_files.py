"""Safetensors files as bytes: tensors are copied and hashed without being decoded, a piece at a time.

The format: eight bytes of length (little endian), so many bytes of JSON naming dtype, shape and place of each tensor,
then the tensors one after the other.
"""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from ..vision_towers import UserError

PIECE = 1 << 24  # bytes held at a time
FLOATS = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
CODES = {dtype: code for code, dtype in FLOATS.items()}


@dataclass(frozen=True)
class Stored:
    """Where a tensor stands: `code` is the format's name of its dtype, `begin` and `size` are in bytes of the file."""

    code: str
    shape: tuple[int, ...]
    begin: int
    size: int

    def in_dtype(self, dtype: torch.dtype | None) -> tuple[str, int]:
        """Code and bytes after conversion; only floating point tensors are converted."""
        if dtype is None or self.code not in FLOATS:
            return self.code, self.size
        return CODES[dtype], math.prod(self.shape) * dtype.itemsize


@dataclass(frozen=True)
class Proof:
    """What two copies of a tensor agree on when they are the same."""

    dtype: str
    shape: tuple[int, ...]
    sha256: str


def read_header(path: Path) -> dict[str, Stored]:
    """The tensors of a file, in the order they stand in.

    Raises:
        UserError: no safetensors file, or one that ends too early.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            fields = json.loads(file.read(length)) if length <= size - 8 else None
        except ValueError:
            fields = None
    if not isinstance(fields, dict):
        raise UserError(f"{path} is no safetensors file; fetch it again.")
    fields.pop("__metadata__", None)
    start = 8 + length
    found = {
        name: Stored(
            at["dtype"],
            tuple(at["shape"]),
            start + at["data_offsets"][0],
            at["data_offsets"][1] - at["data_offsets"][0],
        )
        for name, at in sorted(fields.items(), key=lambda item: item[1]["data_offsets"])
    }
    if any(at.begin + at.size > size for at in found.values()):
        raise UserError(f"{path} ends before its last tensor does; fetch it again.")
    return found


def copy_tensors(
    source: Path, tensors: Mapping[str, Stored], target: Path, dtype: torch.dtype | None
) -> dict[str, Proof]:
    """Write some tensors of a file into another one, converted when `dtype` is given. The file appears whole or not at
    all, unless the power goes: nothing waits for the disk here, as with `cp`.

    Returns:
        What should stand in it, hashed on the way.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    place = 0
    for name, stored in tensors.items():
        code, size = stored.in_dtype(dtype)
        header[name] = {"dtype": code, "shape": list(stored.shape), "data_offsets": [place, place + size]}
        place += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    beside, proofs = target.with_name(f".{target.name}.tmp"), {}
    with source.open("rb") as given, beside.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for name, stored in tensors.items():
            digest = hashlib.sha256()
            for piece in _pieces(given, stored):
                converted = _convert(piece, stored.code, dtype)
                digest.update(converted)
                out.write(converted)
            proofs[name] = Proof(stored.in_dtype(dtype)[0], stored.shape, digest.hexdigest())
    beside.replace(target)
    return proofs


def prove_tensors(path: Path, names: Collection[str]) -> dict[str, Proof]:
    """Hash tensors as they stand in a file, by their names there."""
    found, proofs = read_header(path), {}
    with path.open("rb") as file:
        for name, stored in found.items():
            if name in names:
                digest = hashlib.sha256()
                for piece in _pieces(file, stored):
                    digest.update(piece)
                proofs[name] = Proof(stored.code, stored.shape, digest.hexdigest())
    return proofs


def read_tensor(path: Path, stored: Stored) -> torch.Tensor:
    """One floating point tensor."""
    with path.open("rb") as file:
        file.seek(stored.begin)
        data = bytearray(file.read(stored.size))
    return torch.frombuffer(data, dtype=FLOATS[stored.code]).view(stored.shape)


def same_file(source: Path, target: Path) -> bool:
    """Let `target` be `source`, by a hard link where the disk allows it, else by a copy; whole or not at all.

    Returns:
        Whether it is a link.
    """
    beside = target.with_name(f".{target.name}.tmp")
    beside.unlink(missing_ok=True)
    try:
        os.link(source.resolve(), beside)  # a file of the hub's cache is a symbolic link
    except OSError:
        shutil.copyfile(source, beside)
    beside.replace(target)
    return target.samefile(source)


def _pieces(file: BinaryIO, stored: Stored) -> Iterator[bytes]:
    file.seek(stored.begin)
    left = stored.size
    while left:
        piece = file.read(min(PIECE, left))
        left -= len(piece)
        yield piece


def _convert(piece: bytes, code: str, dtype: torch.dtype | None) -> bytes:
    if dtype is None or code not in FLOATS or FLOATS[code] == dtype:
        return piece
    values = torch.frombuffer(bytearray(piece), dtype=FLOATS[code]).to(dtype)
    return values.view(torch.uint8).numpy().tobytes()
