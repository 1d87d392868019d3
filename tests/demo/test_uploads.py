"""Uploads: what is a picture is opened, what is not is refused in one sentence that says why."""

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from regiontower.demo.limits import Limits
from regiontower.demo.uploads import read_picture, short_name
from regiontower.vision_towers import UserError

sys.path.insert(0, str(Path(__file__).parent))
from bad_files import claimed_png, encoded

LIMITS = Limits(file_bytes=300_000, pixels=1_000_000, kept_pixels=40_000)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_pictures_of_every_kind_open(noise_image, kind):
    upload = read_picture(encoded(noise_image(120, 90), kind), f"photo.{kind.lower()}", LIMITS)
    assert upload.image.size == (120, 90) and upload.image.mode == "RGB" and upload.note == ""


@pytest.mark.parametrize(
    ("data", "name", "says"),
    [
        (b"", "a.png", "a.png is empty (0 bytes)"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>", "a.svg", "an SVG drawing"),
        (b"\n<?xml version='1.0'?>\n<!-- x --><svg onload='alert(1)'/>", "a.png", "an SVG drawing"),
        (b"<!doctype html><script>alert(1)</script>", "a.jpg", "a web page"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100), "IMG_1.HEIC", "HEIC photo"),
        (b"hello, I am no picture", "a.jpg", "a text file whatever its extension says"),
        (b"%PDF-1.7\n" + b"\0" * 50, "a.png", "not an image that can be read"),
        (bytes(300_001), "a.png", "the limit is 0 MB"),
        (claimed_png(8_000, 10_000), "80mp.png", "8000 x 10000 = 80000000 pixels is more than the limit of 1000000"),
        (claimed_png(20_000, 10_000), "200mp.png", "far more pixels than are opened here; the limit is 1 megapixels"),
        (claimed_png(60_000, 60_000), "bomb.png", "far more pixels than are opened here; the limit is 1 megapixels"),
        (claimed_png(100, 100), "cut.png", "damaged or truncated"),
    ],
)
def test_what_is_no_picture_is_refused_with_its_name_and_the_reason(data, name, says):
    with pytest.raises(UserError) as told:
        read_picture(data, name, LIMITS)
    assert says in str(told.value) and str(told.value).startswith(name) and "\n" not in str(told.value)


def test_a_picture_that_begins_as_heic_does_is_opened_when_it_is_avif(noise_image):
    if not features.check("avif"):
        pytest.skip("this Pillow reads no AVIF")
    data = encoded(noise_image(), "AVIF")
    assert data[8:12] == b"avif" and data[20:].index(b"mif1") < 20
    swapped = data[:8] + b"mif1" + data[12:]
    assert read_picture(swapped, "a.avif", LIMITS).image.size == (120, 90)


def test_a_truncated_jpeg_is_refused_even_where_pillow_was_told_to_be_lenient(noise_image, monkeypatch):
    monkeypatch.setattr("PIL.ImageFile.LOAD_TRUNCATED_IMAGES", True)
    data = encoded(noise_image(), "JPEG")
    with pytest.raises(UserError, match=r"half\.jpg.*damaged or truncated"):
        read_picture(data[: len(data) // 2], "half.jpg", LIMITS)


def test_a_bomb_in_a_text_chunk_is_refused(noise_image):
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text("Comment", "x" * 80_000_000, zip=True)
    data = encoded(noise_image(), "PNG", pnginfo=info)
    with pytest.raises(UserError, match=r"^a\.png"):
        read_picture(data, "a.png", Limits())


def test_a_picture_under_another_extension_opens_and_is_remarked_on(noise_image):
    upload = read_picture(encoded(noise_image(), "PNG"), "photo.jpg", LIMITS)
    assert upload.image.size == (120, 90)
    assert upload.note == "photo.jpg is a PNG picture under another extension; it was opened as PNG."


def test_a_large_picture_is_made_smaller_in_its_shape():
    image = Image.fromarray(np.zeros((300, 600, 3), dtype=np.uint8))
    upload = read_picture(encoded(image, "PNG"), "a.png", LIMITS)
    assert upload.image.size == (282, 141) and "from 600 x 300 pixels" in upload.note


def test_a_picture_of_a_few_pixels_is_refused(noise_image):
    with pytest.raises(UserError, match="at least 8 x 8 are needed"):
        read_picture(encoded(noise_image(4, 90), "PNG"), "a.png", LIMITS)


def test_names_lose_folders_and_what_cannot_be_printed():
    assert short_name("../../etc/x.png") == "x.png"
    assert short_name("C:\\users\\me\\x.png") == "x.png"
    assert short_name("a\x00\nb.png") == "ab.png"
    assert short_name("///") == "The picture"
    assert len(short_name("x" * 500 + ".png")) == 80
