"""Files that claim what they are not, for the tests of uploads and of the page."""

import io
import struct
import zlib

from PIL import Image


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    """A picture as a file's bytes."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def claimed_png(width: int, height: int) -> bytes:
    """A PNG that says it has so many pixels and holds 64."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return start + encoded(Image.new("1", (8, 8)), "PNG")[len(start) :]
