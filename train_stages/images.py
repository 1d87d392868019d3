"""Read an image file as what a person sees: RGB, upright, over white; or say in one sentence why that is impossible.

What happens to each kind of file:
- EXIF orientation is applied; `width`, `height` and boxes of a record refer to the raster after that.
- Alpha (also a transparent palette entry or colour) is composited on white.
- CMYK goes through the ICC profile in the file when there is one, else through Pillow's plain formula.
- 16-bit gray is scaled (65535 -> 255), not cut off. 32-bit integers outside 0..65535 and floats have no known white
  and are refused.
- An animation gives its first frame. The file's extension is not looked at.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageFile

from ..vision_towers.errors import UserError

MAX_PIXELS = 89_478_485  # Pillow warns from here on (a quarter of a GB as RGB) and refuses at twice as much
# Photographs and scans. Others are not tried: Pillow would hand an EPS file to Ghostscript.
_FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")


class ImageError(UserError):
    """An image file that cannot be used: one sentence with its path and the reason."""


def open_image(path: str | Path, max_pixels: int = MAX_PIXELS, data: bytes | None = None) -> Image.Image:
    """Decode `path` to an upright RGB image of its own, free of metadata (see the module's text for each kind of file).

    data: the file's bytes where there is no such file, as in a shard; `path` is then only its name.
    Raises ImageError when the file is missing, empty, truncated, no image, of a refused kind, or larger than
    `max_pixels` (checked on the header, before any pixel is decoded).
    """
    with _open_header(path, max_pixels, data) as image:
        try:
            _load_whole(image)
            orientation = _orientation(image)
            upright = _to_rgb(_turn(image, orientation))
        except ImageError:
            raise
        except Exception as error:  # decoders raise all sorts of things on broken bytes
            raise ImageError(f"{path}: the image is damaged or truncated ({_reason(error)}).") from error
    upright.info = {}  # an EXIF orientation left behind would turn the image a second time
    return upright


def image_size(path: str | Path, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """(width, height) after EXIF transpose, from the header (a PNG whose EXIF may stand behind its pixels is read to
    its end). Raises ImageError as `open_image` does, except for damage that only decoding shows.
    """
    with _open_header(path, max_pixels) as image:
        width, height = image.size
        # Pillow reports a TIFF's size upright already, and turns the raster itself when it loads it.
        turned = image.format != "TIFF" and _orientation(image) >= 5
        return (height, width) if turned else (width, height)


def _open_header(path: str | Path, max_pixels: int, data: bytes | None = None) -> Image.Image:
    path = Path(path)
    try:
        if (path.stat().st_size if data is None else len(data)) == 0:
            raise ImageError(f"{path}: the file is empty (0 bytes).")
        image = Image.open(path if data is None else io.BytesIO(data), formats=_known_formats())
    except ImageError:
        raise
    except FileNotFoundError:
        raise ImageError(f"{path}: no such image file.") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(f"{path}: the image is too large to open safely ({_reason(error)}).") from None
    except Image.UnidentifiedImageError:
        raise ImageError(f"{path}: not an image that can be read ({', '.join(_known_formats())}).") from None
    except Exception as error:  # header parsers raise all sorts of things on broken bytes
        raise ImageError(f"{path}: the image cannot be opened ({_reason(error)}).") from error
    width, height = image.size
    if width * height > max_pixels:
        image.close()
        raise ImageError(
            f"{path}: {width} x {height} = {width * height} pixels is more than the limit of {max_pixels}; "
            "make the image smaller."
        )
    return image


def _load_whole(image: Image.Image) -> None:
    """Decode, and fail on a truncated file whatever the process says.

    Other libraries (lmms-eval among them) switch Pillow's LOAD_TRUNCATED_IMAGES on for everybody: a photograph that
    is gray from the middle down would be trained on without a word.
    """
    tolerated, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
    try:
        image.load()
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = tolerated


def _known_formats() -> list[str]:
    Image.init()
    return [name for name in _FORMATS if name in Image.OPEN]


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1..8; 1 when there is none, or when the EXIF block is damaged, as viewers do."""
    try:
        value = image.getexif().get(0x0112, 1)
    except Exception:  # EXIF of real photographs is broken in many ways
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _turn(image: Image.Image, orientation: int) -> Image.Image:
    methods = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }
    return image.transpose(methods[orientation]) if orientation in methods else image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        return _deep_gray_to_8_bit(image).convert("RGB")
    if image.mode == "CMYK":
        return _cmyk_to_rgb(image)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _deep_gray_to_8_bit(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    if values.dtype.kind == "f" or values.min() < 0 or values.max() > 65535:
        raise ImageError(
            f"{getattr(image, 'filename', 'image')}: pixels of mode {image.mode} outside 16-bit gray have no known "
            "white; convert the image to 8 or 16 bits."
        )
    return Image.fromarray(((values.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8))


def _cmyk_to_rgb(image: Image.Image) -> Image.Image:
    profile = image.info.get("icc_profile")
    if profile:
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
            if converted is not None:
                return converted
        except (ImageCms.PyCMSError, OSError, TypeError, ValueError):
            pass  # a damaged or foreign profile: the plain formula is the best that is left
    return image.convert("RGB")


def _reason(error: Exception) -> str:
    return str(error).rstrip(".") or type(error).__name__
