"""Where a picture's bytes are, before anybody needs them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from .images import ImageError, image_size, open_image
from .record_io import load_record_image
from .records import Record


@dataclass(frozen=True)
class PictureFile:
    """An image file: its bytes, or the file they are in, whole or `length` bytes from `start` on (a shard).

    name: for messages. record: when given, the picture must have its size.
    """

    name: str
    path: Path | None = None
    start: int = 0
    length: int | None = None
    data: bytes | None = None
    record: Record | None = None

    def read(self) -> bytes:
        """Raises ImageError when the file is not there."""
        if self.data is not None:
            return self.data
        assert self.path is not None
        try:
            with self.path.open("rb") as file:
                file.seek(self.start)
                return file.read() if self.length is None else file.read(self.length)
        except OSError as error:
            raise ImageError(f"{self.name}: the image cannot be read ({error.strerror}).") from None

    def open(self) -> Image.Image:
        """Decoded, upright RGB. Raises ImageError for a missing or damaged one, or one of another size than its
        record says."""
        data = self.read()
        if self.record is not None:
            return load_record_image(Path(), self.record, data=data)
        return open_image(self.name, data=data)

    def size(self) -> tuple[int, int]:
        """(width, height) of the upright picture, from its header where it lies in a file of its own. Raises
        ImageError."""
        if self.record is not None:
            return self.record.width, self.record.height
        if self.path is not None and self.length is None:
            return image_size(self.path)
        return self.open().size

    def sha256(self) -> str:
        """Of its bytes. Raises ImageError when the file is not there."""
        return hashlib.sha256(self.read()).hexdigest()
