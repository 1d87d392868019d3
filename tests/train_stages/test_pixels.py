"""The pixel cache: decoded once, keyed by what it was made from, and no image lost without a word."""

import errno
import os

import numpy as np
import pytest
from PIL import Image

from regiontower.mllm.boxes import Boxes, mean_colour
from regiontower.train_stages import pixels as module
from regiontower.train_stages.pixels import CLIP_GREY, PixelCache, load_pixels
from regiontower.train_stages.record_io import RecordSet
from regiontower.train_stages.records import Record, Region
from regiontower.vision_towers.errors import UserError

SIDE = 28


@pytest.fixture
def make_set(tmp_path):
    def make(count):
        rng = np.random.default_rng(0)
        records = []
        for i in range(count):
            width, height = 30 + i % 5 * 7, 40
            Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
            records.append(Record(image=f"{i}.png", width=width, height=height))
        return RecordSet(tmp_path / "records.jsonl", tmp_path, records)

    return make


def test_pixels_and_frames_are_the_letterboxed_images(make_set):
    record_set = make_set(4)
    cache = PixelCache.build(record_set, SIDE, progress=False)
    for row, record in enumerate(record_set.records):
        pixels, frame = load_pixels(record_set.image_path(record), SIDE)
        assert pixels.shape == (3, SIDE, SIDE)
        np.testing.assert_array_equal(cache.pixels[row], pixels)
        assert cache.frames[row] == frame


def test_padding_has_the_fill_colour_and_boxes_follow(tmp_path):
    image = Image.new("RGB", (40, 20), (0, 0, 0))
    image.paste((255, 0, 0), (20, 0, 40, 10))
    image.save(tmp_path / "a.png")
    record = Record(image="a.png", width=40, height=20, regions=[Region(box_xyxy=(20, 0, 40, 10))])
    cache = PixelCache.build(RecordSet(tmp_path, tmp_path, [record]), 40, fill=(1, 2, 3), progress=False)
    assert cache.pixels[0][:, 0, 0].tolist() == [1, 2, 3]
    (box,), _ = cache.frames[0].to_input(Boxes([record.regions[0].box_xyxy]))
    x0, y0, x1, y1 = map(int, box)
    assert (cache.pixels[0][0, y0:y1, x0:x1] == 255).all()
    assert (cache.pixels[0][0] == 255).sum() == (x1 - x0) * (y1 - y0)


def test_disk_and_memory_and_worker_processes_agree(make_set, tmp_path):
    record_set = make_set(module._POOL_FROM + 3)
    on_disk = PixelCache.build(record_set, SIDE, tmp_path / "cache", progress=False)
    few = RecordSet(record_set.path, record_set.root, record_set.records[:5])
    np.testing.assert_array_equal(on_disk.pixels[:5], PixelCache.build(few, SIDE, progress=False).pixels)
    assert isinstance(on_disk.pixels, np.memmap)
    assert not on_disk.pixels.flags.writeable


def test_decodes_once_until_something_changes(make_set, tmp_path, monkeypatch):
    record_set = make_set(3)
    decoded = []
    real = module._decode
    monkeypatch.setattr(module, "_decode", lambda job: decoded.append(job) or real(job))

    def build(side=SIDE, fill=CLIP_GREY):
        before = len(decoded)
        PixelCache.build(record_set, side, tmp_path / "cache", fill=fill, progress=False)
        return len(decoded) - before

    assert [build(), build()] == [3, 0]
    assert [build(side=14), build(fill=(0, 0, 0))] == [3, 3]
    Image.new("RGB", (30, 40), (9, 9, 9)).save(tmp_path / "0.png")
    assert [build(), build()] == [3, 0]
    assert not list((tmp_path / "cache").glob("*.part"))


def test_unreadable_images_are_named_and_the_rest_stays_in_order(make_set, tmp_path):
    record_set = make_set(6)
    (tmp_path / "1.png").write_bytes(b"no image")
    (tmp_path / "3.png").unlink()
    Image.new("RGB", (9, 9)).save(tmp_path / "4.png")  # not the size that the record says
    for _ in range(2):  # built, and read back
        cache = PixelCache.build(record_set, SIDE, tmp_path / "cache", progress=False)
        assert [record.image for record in cache.records] == ["0.png", "2.png", "5.png"]
        assert [bad.line for bad in cache.bad] == ["1.png", "3.png", "4.png"]
        np.testing.assert_array_equal(cache.pixels[2], load_pixels(tmp_path / "5.png", SIDE)[0])
        assert cache.frames[2].original_size == (record_set.records[5].width, 40)


def test_too_many_unreadable_images_stop_the_run(make_set, tmp_path):
    record_set = make_set(8)
    for i in range(6):
        (tmp_path / f"{i}.png").unlink()
    with pytest.raises(UserError, match=r"0\.png"):
        PixelCache.build(record_set, SIDE, tmp_path / "cache", progress=False)
    assert not list((tmp_path / "cache").iterdir())


def test_mean_colour_is_what_normalisation_turns_into_zero():
    assert mean_colour((0.48145466, 0.4578275, 0.40821073)) == CLIP_GREY


def test_a_disk_without_room_is_said_before_anything_is_decoded(make_set, tmp_path, monkeypatch):
    def full(descriptor, offset, length):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    monkeypatch.setattr(module, "_decoded", lambda *args: pytest.fail("decoded"))
    with pytest.raises(UserError, match=r"4 decoded pictures of 28 px take 0\.00 GB .*No space left") as error:
        PixelCache.build(make_set(4), SIDE, tmp_path / "cache", progress=False)
    assert "\n" not in str(error.value) and not list((tmp_path / "cache").iterdir())


def decodings(rank, record_set, folder):
    """How many images this process decodes into the folder, from there once more, and in memory; and the pixels."""
    decoded = []
    real = module._decode
    module._decode = lambda job: decoded.append(job) or real(job)
    found, counts = [], []
    for where in (folder, folder, None):
        before = len(decoded)
        found.append(PixelCache.build(record_set, SIDE, where, progress=False).pixels)
        counts.append(len(decoded) - before)
    return counts, [pixels.tolist() for pixels in found]


def test_of_several_processes_the_first_decodes_and_the_others_wait(make_set, in_processes, tmp_path):
    record_set = make_set(4)
    (first, pixels), (second, others) = in_processes(2, decodings, record_set, tmp_path / "cache")
    assert (first, second) == ([4, 0, 4], [0, 0, 4])
    assert pixels == others and pixels[0] == pixels[1] == pixels[2]
    assert sorted(path.suffix for path in (tmp_path / "cache").iterdir()) == [".json", ".npy"]
