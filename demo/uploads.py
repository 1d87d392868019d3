"""Uploaded bytes -> a picture, or one sentence that says what is wrong with them.

What a file is, is read from its bytes; its name decides nothing and serves for messages alone.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import PurePath

from PIL import Image

from ..train_stages.images import open_image
from ..vision_towers import UserError
from .limits import Limits

MIN_SIDE = 8  # pixels; below that there is nothing to see and resizing to the tower's input makes no sense

# First bytes -> format, and the extensions that such a file may have.
_SIGNATURES: tuple[tuple[re.Pattern[bytes], str, tuple[str, ...]], ...] = (
    (re.compile(rb"\x89PNG\r\n"), "PNG", (".png", ".apng")),
    (re.compile(rb"\xff\xd8\xff"), "JPEG", (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo")),
    (re.compile(rb"GIF8[79]a"), "GIF", (".gif",)),
    (re.compile(rb"RIFF....WEBP", re.DOTALL), "WebP", (".webp",)),
    (re.compile(rb"BM"), "BMP", (".bmp", ".dib")),
    (re.compile(rb"II\*\0|MM\0\*"), "TIFF", (".tif", ".tiff")),
    (re.compile(rb"....ftypavi[fs]", re.DOTALL), "AVIF", (".avif",)),
)
_HEIC = re.compile(rb"....ftyp(heic|heix|hevc|hevx|heim|heis|mif1|msf1)", re.DOTALL)
_MARKUP = re.compile(rb"\s*(?:\xef\xbb\xbf)?\s*<(?:\?xml|!--|!doctype|svg|html|script)", re.IGNORECASE)
_ADVICE = "Upload a PNG, JPEG, WebP, GIF, BMP, TIFF or AVIF picture."


@dataclass(frozen=True)
class Upload:
    """A picture, upright RGB, and a remark about the file when there is one to make."""

    image: Image.Image
    note: str = ""


def read_picture(data: bytes, name: str, limits: Limits) -> Upload:
    """Decode an upload.

    Args:
        data: the file's bytes.
        name: what the user calls it.
    Raises:
        UserError: empty, too many bytes or pixels, no picture, a kind that is not read here, or damaged.
    """
    name = short_name(name)
    check_size(len(data), name, limits)
    _refuse_other_kinds(data, name)
    try:
        image = open_image(name, limits.pixels, data)
    except UserError as error:
        if isinstance(error.__context__, Image.DecompressionBombError):  # Pillow's sentence is for programmers
            most = f"the limit is {limits.pixels / 1e6:.0f} megapixels"
            raise UserError(f"{name} has far more pixels than are opened here; {most}. Make it smaller.") from None
        raise
    if min(image.size) < MIN_SIDE:
        raise UserError(
            f"{name} is {image.width} x {image.height} pixels; at least {MIN_SIDE} x {MIN_SIDE} are needed."
        )
    small = _shrunk(image, limits.kept_pixels)
    shrunk = "" if small is image else f"{name} was made smaller, from {image.width} x {image.height} pixels."
    return Upload(small, " ".join(filter(None, (_wrong_extension(data, name), shrunk))))


def check_size(size: int, name: str, limits: Limits) -> None:
    """Refuse a file by its number of bytes.

    Raises:
        UserError: empty, or too many.
    """
    name = short_name(name)
    if not size:
        raise UserError(f"{name} is empty (0 bytes). {_ADVICE}")
    if size > limits.file_bytes:
        raise UserError(
            f"{name} has {size / 2**20:.1f} MB; the limit is {limits.file_bytes / 2**20:.0f} MB. Make it smaller."
        )


def short_name(name: str) -> str:
    """The last part of a name a user gave, printable and short enough for a message."""
    printable = "".join(c for c in PurePath(name.replace("\\", "/")).name if c.isprintable())
    return printable[-80:] or "The picture"


def _shrunk(image: Image.Image, pixels: int) -> Image.Image:
    scale = (pixels / (image.width * image.height)) ** 0.5
    if scale >= 1:
        return image
    size = (max(1, int(image.width * scale)), max(1, int(image.height * scale)))
    return image.resize(size, Image.Resampling.LANCZOS)


def _refuse_other_kinds(data: bytes, name: str) -> None:
    start = data[:512]
    if _HEIC.match(start) and b"avif" not in start[:40]:  # both may begin with the same brand
        raise UserError(
            f"{name} is a HEIC photo, which is not read here: save it as JPEG (most phones can) and try again."
        )
    if _MARKUP.match(start):
        kind = "an SVG drawing" if b"<svg" in data[:4096].lower() else "a web page or XML"
        raise UserError(
            f"{name} is {kind}, not a photograph, and is never opened here: such files can hold scripts. {_ADVICE}"
        )
    if b"\0" not in start and not any(pattern.match(start) for pattern, _, _ in _SIGNATURES) and start[:1] != b"P":
        raise UserError(f"{name} is a text file whatever its extension says. {_ADVICE}")


def _wrong_extension(data: bytes, name: str) -> str:
    extension = PurePath(name).suffix.lower()
    for pattern, kind, extensions in _SIGNATURES:
        if pattern.match(data):
            wrong = extension and extension not in extensions
            return f"{name} is a {kind} picture under another extension; it was opened as {kind}." if wrong else ""
    return ""
