"""Frames: the map original <-> input against the pixels themselves, and what crops do to boxes."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from regiontower.mllm.boxes import Boxes, ImageFrame, letterbox_image
from regiontower.vision_towers.errors import UserError

SIZES = st.tuples(st.integers(1, 3000), st.integers(1, 3000))
UNIT = st.floats(0, 1, allow_subnormal=False)


@st.composite
def frames(draw):
    size = draw(SIZES)
    kind = draw(st.sampled_from(["identity", "resize", "letterbox", "crop", "tiles", "resize-crop"]))
    side = draw(st.integers(8, 600))
    if kind == "identity":
        return ImageFrame.identity(size)
    if kind == "resize":
        return ImageFrame.resize(size, (side, draw(st.integers(8, 600))))
    if kind == "letterbox":
        return ImageFrame.letterbox(size, side)
    if kind == "tiles":
        tiles = ImageFrame.tiles(size, (draw(st.integers(1, 4)), draw(st.integers(1, 4))), side)
        return draw(st.sampled_from(tiles))
    if kind == "resize-crop":
        scale = side / min(size)
        short = (max(side, round(size[0] * scale)), max(side, round(size[1] * scale)))
        left, top = (short[0] - side) // 2, (short[1] - side) // 2
        return ImageFrame.resize(size, short).then(
            ImageFrame.crop(short, (left, top, left + side, top + side), (side, side))
        )
    # A crop that may stick out on every side, but shows at least half a pixel.
    x1 = draw(st.floats(-0.5 * size[0], size[0] - 0.5))
    y1 = draw(st.floats(-0.5 * size[1], size[1] - 0.5))
    x2 = draw(st.floats(max(x1, 0) + 0.5, 1.5 * size[0] + 0.5))
    y2 = draw(st.floats(max(y1, 0) + 0.5, 1.5 * size[1] + 0.5))
    return ImageFrame.crop(size, (x1, y1, x2, y2), (side, draw(st.integers(8, 600))))


@st.composite
def boxes_in(draw, size):
    rows = []
    for _ in range(draw(st.integers(0, 4))):
        x, y = sorted(draw(st.tuples(UNIT, UNIT))), sorted(draw(st.tuples(UNIT, UNIT)))
        rows.append([x[0] * size[0], y[0] * size[1], x[1] * size[0], y[1] * size[1]])
    return Boxes(rows)


@given(st.data())
@settings(max_examples=120, deadline=None, derandomize=True)
def test_there_and_back_is_the_visible_part(data):
    frame = data.draw(frames())
    boxes = data.draw(boxes_in(frame.original_size))
    inside, kept = frame.to_input(boxes)
    x1, y1, x2, y2 = frame.visible_xyxy
    expected = np.clip(boxes.xyxy, [x1, y1, x1, y1], [x2, y2, x2, y2])
    np.testing.assert_allclose(frame.to_original(inside).xyxy, expected[kept], atol=1e-6)
    assert (inside.xyxy >= 0).all() and (inside.xyxy <= np.tile(frame.input_size, 2)).all()
    # Whoever is absent shows no area at all.
    gone = np.setdiff1d(np.arange(len(boxes)), kept)
    assert (Boxes(expected[gone]).area == 0).all()


@given(frames())
@settings(max_examples=100, deadline=None, derandomize=True)
def test_the_visible_part_lies_in_the_image_and_maps_into_the_input(frame):
    x1, y1, x2, y2 = frame.visible_xyxy
    assert 0 <= x1 < x2 <= frame.original_size[0] and 0 <= y1 < y2 <= frame.original_size[1]
    corners = np.array([[x1, y1], [x2, y2]]) * frame.scale + frame.offset
    assert (corners >= -1e-6).all() and (corners <= np.array(frame.input_size) + 1e-6).all()


def test_a_crop_cuts_and_drops():
    frame = ImageFrame.crop((100, 100), (20, 20, 60, 60), (80, 80))
    boxes = Boxes([[0, 0, 30, 30], [30, 30, 40, 40], [70, 70, 90, 90], [0, 20, 20, 60], [10, 10, 90, 90]])
    inside, kept = frame.to_input(boxes)
    assert kept.tolist() == [0, 1, 4]  # row 2 lies outside, row 3 only touches
    assert inside == Boxes([[0, 0, 20, 20], [20, 20, 40, 40], [0, 0, 80, 80]])
    assert frame.to_original(inside) == Boxes([[20, 20, 30, 30], [30, 30, 40, 40], [20, 20, 60, 60]])


def test_a_box_without_area_is_kept_inside_and_dropped_outside():
    frame = ImageFrame.crop((100, 100), (20, 20, 60, 60), (40, 40))
    _, kept = frame.to_input(Boxes([[30, 30, 30, 40], [20, 30, 20, 40], [70, 70, 70, 70], [10, 30, 10, 40]]))
    assert kept.tolist() == [0, 1]


def test_a_crop_that_sticks_out_shows_only_the_image():
    frame = ImageFrame.crop((100, 50), (-50, -10, 50, 40), (100, 50))
    assert frame.visible_xyxy == (0, 0, 50, 40)
    assert frame.to_input(Boxes([[0, 0, 100, 50]]))[0] == Boxes([[50, 10, 100, 50]])
    assert frame.to_original(Boxes([[0, 0, 100, 50], [0, 0, 10, 5]])) == Boxes([[0, 0, 50, 40], [0, 0, 0, 0]])


def test_a_crop_of_nothing_is_a_user_error():
    for crop in [(100, 0, 150, 50), (-20, 0, 0, 50), (10, 10, 10, 20)]:
        with pytest.raises(UserError, match="shows nothing"):
            ImageFrame.crop((100, 50), crop, (10, 10))
    with pytest.raises(UserError, match="whole positive"):
        ImageFrame.letterbox((100, 0), 56)
    with pytest.raises(UserError, match="whole positive"):
        ImageFrame.resize((100, 50), (10.5, 10))  # type: ignore[arg-type]


def test_tiles_cover_the_image_once():
    tiles = ImageFrame.tiles((301, 200), (3, 2), 56)
    assert len(tiles) == 6 and all(tile.input_size == (56, 56) for tile in tiles)
    areas = [Boxes([tile.visible_xyxy]).area[0] for tile in tiles]
    assert sum(areas) == pytest.approx(301 * 200)
    assert tiles[1].visible_xyxy == (301 / 3, 0, 602 / 3, 100)  # row by row
    box = Boxes([[10, 10, 290, 190]])
    parts = [tile.to_original(tile.to_input(box)[0]) for tile in tiles]
    assert sum(part.area.sum() for part in parts) == pytest.approx(box.area[0])


def test_resize_then_crop_is_clips_preprocessing():
    frame = ImageFrame.resize((640, 480), (298, 224)).then(ImageFrame.crop((298, 224), (37, 0, 261, 224), (224, 224)))
    assert frame.input_size == (224, 224)
    x1, y1, x2, y2 = frame.visible_xyxy
    assert (y1, y2) == (0, 480) and x1 == pytest.approx(37 * 640 / 298) and x2 == pytest.approx(261 * 640 / 298)
    np.testing.assert_allclose(frame.to_input(Boxes([[x1, y1, x2, y2]]))[0].xyxy, [[0, 0, 224, 224]], atol=1e-9)
    assert len(frame.to_input(Boxes([[0, 0, 70, 480]]))[0]) == 0  # the centre crop cut it off


def test_frames_that_do_not_meet_are_user_errors():
    with pytest.raises(UserError, match="cannot follow"):
        ImageFrame.resize((640, 480), (224, 224)).then(ImageFrame.identity((640, 480)))
    with pytest.raises(UserError, match="only padding"):
        ImageFrame.letterbox((100, 50), 100).then(ImageFrame.crop((100, 100), (0, 0, 100, 25), (50, 50)))


def test_a_frame_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        ImageFrame.identity((4, 4)).scale = (2, 2)  # type: ignore[misc]


def test_letterbox_numbers():
    frame = ImageFrame.letterbox((640, 480), 112)
    assert frame.scale == (112 / 640, 84 / 480) and frame.offset == (0, 14)
    assert frame.visible_xyxy == (0, 0, 640, 480)
    assert ImageFrame.letterbox((3000, 1), 112).scale == (112 / 3000, 1.0)  # never less than one pixel


@pytest.mark.parametrize("side", [112, 337])
@pytest.mark.parametrize("size", [(640, 480), (201, 333), (64, 64), (50, 400)])
def test_letterbox_pixels_agree_with_the_frame(size, side):
    fill = (0, 0, 255)
    box = (size[0] // 5, size[1] // 4, size[0] // 2, (3 * size[1]) // 5)
    image = Image.new("RGB", size, (0, 60, 0))
    image.paste((255, 60, 0), box)
    square, frame = letterbox_image(image, side, fill)
    assert square.size == (side, side) and square.mode == "RGB"

    pixels = np.asarray(square).astype(int)
    rows, columns = np.nonzero(pixels[..., 0] > 127)
    found = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    # A pixel is over one half red when its centre is inside: its edge is within half a pixel of the mapped one.
    np.testing.assert_allclose(found, frame.to_input(Boxes([box]))[0].xyxy[0], atol=0.75)

    rows, columns = np.nonzero(pixels[..., 2] < 127)  # the content: whatever is not fill
    content = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    np.testing.assert_allclose(content, frame.to_input(Boxes([[0, 0, *size]]))[0].xyxy[0], atol=1e-9)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1"])
def test_letterbox_takes_any_mode(mode):
    square, _ = letterbox_image(Image.new(mode, (30, 20)), 28, (1, 2, 3))
    assert square.mode == "RGB" and square.getpixel((0, 0)) == (1, 2, 3)
