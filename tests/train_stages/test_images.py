import io
import random
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageFile

from regiontower.train_stages.images import MAX_PIXELS, ImageError, image_size, open_image
from regiontower.vision_towers.errors import UserError

ORIENTATION = 0x0112


def picture(width: int = 24, height: int = 16) -> np.ndarray:
    """A picture in which every corner differs: (height, width, 3) uint8."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 10, y * 15, np.where(x > y, 200, 40)], axis=-1).astype(np.uint8)


def png_claiming(width: int, height: int) -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")
    )


def fault(path: Path, **options) -> str:
    with pytest.raises(ImageError) as caught:
        open_image(path, **options)
    assert isinstance(caught.value, UserError)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    return message


# --- files that cannot be used


def test_missing_file(tmp_path):
    assert "no such image file" in fault(tmp_path / "missing.jpg")


def test_empty_file(tmp_path):
    (tmp_path / "empty.png").write_bytes(b"")
    assert "empty" in fault(tmp_path / "empty.png")


def test_not_an_image(tmp_path):
    (tmp_path / "text.jpg").write_text("this is no picture")
    assert "not an image" in fault(tmp_path / "text.jpg")


def test_postscript_is_not_even_tried(tmp_path):
    (tmp_path / "page.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")
    assert "not an image" in fault(tmp_path / "page.png")


def test_a_folder_is_not_an_image(tmp_path):
    (tmp_path / "folder.png").mkdir()
    assert "cannot be opened" in fault(tmp_path / "folder.png") or "empty" in fault(tmp_path / "folder.png")


@pytest.mark.parametrize("tolerated", [False, True])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "TIFF"])
def test_truncated_file(tmp_path, kind, tolerated, monkeypatch):
    """Also where another library has told Pillow to put up with it."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", tolerated)
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, kind)
    path = tmp_path / "cut"
    path.write_bytes(buffer.getvalue()[: buffer.getbuffer().nbytes // 2])
    assert "image" in fault(path)
    path.write_bytes(buffer.getvalue())
    assert open_image(path).size == (64, 64)
    assert tolerated == ImageFile.LOAD_TRUNCATED_IMAGES


@pytest.mark.parametrize(
    ("width", "height", "limit"), [(60_000, 60_000, {}), (10_000, 9_000, {}), (30, 30, {"max_pixels": 899})]
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_decompression_bomb_is_refused_on_its_header(tmp_path, monkeypatch, width, height, limit):
    path = tmp_path / "bomb.png"
    path.write_bytes(png_claiming(width, height))

    def decoding(*_):
        raise AssertionError("pixels were decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", decoding)
    assert str(width * height) in fault(path, **limit)
    with pytest.raises(ImageError, match=str(width * height)):
        image_size(path, **limit)


@pytest.mark.filterwarnings("error::PIL.Image.DecompressionBombWarning")
def test_decompression_bomb_when_pillows_warning_is_an_error(tmp_path):
    path = tmp_path / "bomb.png"
    path.write_bytes(png_claiming(10_000, MAX_PIXELS // 10_000 + 1))
    assert "too large" in fault(path)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow on broken EXIF
def test_broken_bytes_raise_nothing_but_image_errors(tmp_path):
    rng = random.Random(0)
    path = tmp_path / "mutated"
    for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"):
        buffer = io.BytesIO()
        Image.fromarray(picture()).save(buffer, kind)
        for _ in range(40):
            data = bytearray(buffer.getvalue())
            for _ in range(rng.randint(1, 8)):
                data[rng.randrange(len(data))] = rng.randrange(256)
            path.write_bytes(data)
            for read in (open_image, image_size):
                try:
                    read(path, max_pixels=1_000_000)
                except ImageError:
                    continue


# --- files that can


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "BMP", "TIFF", "PPM"])
def test_lossless_rgb_is_read_exactly_whatever_the_extension(tmp_path, kind):
    path = tmp_path / "picture.jpg"
    Image.fromarray(picture()).save(path, kind, **({"lossless": True} if kind == "WEBP" else {}))
    image = open_image(path)
    assert (image.mode, image.size, image_size(path)) == ("RGB", (24, 16), (24, 16))
    assert (np.asarray(image) == picture()).all()


def turned_back(orientation: int) -> Image.Image:
    """The raster a camera stores so that `orientation` shows `picture` upright."""
    inverse = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    upright = Image.fromarray(picture())
    return upright.transpose(inverse[orientation]) if orientation in inverse else upright


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_once(tmp_path, kind, orientation):
    path = tmp_path / "turned"
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    options = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}.get(kind, {})
    turned_back(orientation).save(path, kind, exif=exif, **options)
    image = open_image(path)
    assert image.size == image_size(path) == (24, 16)
    assert np.abs(np.asarray(image).astype(int) - picture()).mean() < (6 if kind == "JPEG" else 0.01)
    assert image.getexif().get(ORIENTATION, 1) == 1
    image.save(tmp_path / "again.png")
    assert open_image(tmp_path / "again.png").size == (24, 16)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_damaged_exif_is_ignored(tmp_path):
    path = tmp_path / "a.jpg"
    Image.fromarray(picture()).save(path, exif=b"Exif\0\0MM\0*\xff\xff\xff\xffbroken")
    assert open_image(path).size == image_size(path) == (24, 16)


def test_alpha_is_composited_on_white(tmp_path):
    rgba = np.zeros((2, 3, 4), np.uint8)
    rgba[..., 0] = 200
    rgba[0, :, 3] = (0, 51, 255)
    Image.fromarray(rgba).save(tmp_path / "a.png")
    assert np.asarray(open_image(tmp_path / "a.png"))[0].tolist() == [[255] * 3, [244, 204, 204], [200, 0, 0]]
    Image.fromarray(rgba[..., [0, 3]]).save(tmp_path / "gray_alpha.png")
    assert np.asarray(open_image(tmp_path / "gray_alpha.png"))[0].tolist() == [[255] * 3, [244] * 3, [200] * 3]


def test_palette_with_and_without_transparency(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putdata([0, 1])
    image.save(tmp_path / "plain.png")
    image.save(tmp_path / "clear.png", transparency=0)
    image.save(tmp_path / "clear.gif", transparency=0)
    assert np.asarray(open_image(tmp_path / "plain.png")).tolist() == [[[10, 20, 30], [40, 50, 60]]]
    for name in ("clear.png", "clear.gif"):
        assert np.asarray(open_image(tmp_path / name)).tolist() == [[[255, 255, 255], [40, 50, 60]]]


def test_gray_and_bilevel(tmp_path):
    Image.fromarray(picture()[..., 0]).save(tmp_path / "gray.jpg", quality=100)
    gray = np.asarray(open_image(tmp_path / "gray.jpg")).astype(int)
    assert np.abs(gray - picture()[..., :1]).max() <= 3
    Image.new("1", (3, 2), 1).save(tmp_path / "one.png")
    assert (np.asarray(open_image(tmp_path / "one.png")) == 255).all()


@pytest.mark.parametrize("suffix", ["png", "tiff", "pgm"])
def test_16_bit_gray_is_scaled_not_cut_off(tmp_path, suffix):
    values = np.array([[0, 128, 129, 256, 32768, 65535]], np.uint16)
    path = tmp_path / f"deep.{suffix}"
    Image.fromarray(values).save(path)
    assert np.asarray(open_image(path))[0, :, 0].tolist() == [0, 0, 1, 1, 128, 255]


@pytest.mark.parametrize("values", [np.array([[0, 70_000]], np.int32), np.array([[0.5, 1.0]], np.float32)])
def test_depths_without_a_known_white_are_refused(tmp_path, values):
    Image.fromarray(values).save(tmp_path / "deep.tiff")
    assert "no known white" in fault(tmp_path / "deep.tiff")


def test_cmyk_shows_the_colours_it_was_made_from(tmp_path):
    colours = np.zeros((8, 24, 3), np.uint8)
    colours[:, :8], colours[:, 8:16], colours[:, 16:] = (250, 250, 250), (220, 30, 40), (10, 10, 10)
    Image.fromarray(colours).convert("CMYK").save(tmp_path / "a.jpg", quality=100, subsampling=0)
    with Image.open(tmp_path / "a.jpg") as stored:
        assert stored.mode == "CMYK"
    image = open_image(tmp_path / "a.jpg")
    assert image.mode == "RGB"
    assert np.abs(np.asarray(image).astype(int) - colours)[:, [4, 12, 20]].max() < 12


def test_cmyk_with_an_unusable_profile_falls_back_to_the_plain_formula(tmp_path):
    gray_ink = Image.new("CMYK", (4, 4), (0, 0, 0, 128))
    profiles = {"broken": b"no profile", "foreign": ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()}
    for name, profile in profiles.items():
        gray_ink.save(tmp_path / f"{name}.tiff", icc_profile=profile)
        assert np.asarray(open_image(tmp_path / f"{name}.tiff"))[0, 0].tolist() == [127, 127, 127]


def test_animation_gives_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (5, 4), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert np.asarray(open_image(tmp_path / "a.gif"))[0, 0].tolist() == [255, 0, 0]


def test_an_opened_image_no_longer_needs_its_file(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(picture()).save(path)
    image = open_image(path)
    path.unlink()
    assert (np.asarray(image.crop((0, 0, 24, 16))) == picture()).all()
