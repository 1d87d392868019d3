"""What tells two checkpoints apart, whatever their folders are called."""

from __future__ import annotations

import hashlib
from pathlib import Path

from .errors import UserError


def weights_hash(folder: Path | str) -> str:
    """sha256 (hex) over the names and bytes of `folder`'s *.safetensors files, in the order of their names.

    Raises:
        UserError: the folder holds no safetensors file.
    """
    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise UserError(f"{folder}: no *.safetensors file, so this is no model directory.")
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode() + b"\0")
        with file.open("rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()
