"""Tokens as colours, and maps of what looks like a region."""

import numpy as np
import pytest
import torch
from PIL import Image

from regiontower.eval.probe.pictures import (
    GAP,
    SIDE,
    cosine_to_first,
    heat_colours,
    patch_boxes,
    pca_sheet,
    similarity_sheet,
    token_colours,
)
from regiontower.eval.probe.regions import reading_tower
from regiontower.train_stages.pixels import PixelCache
from regiontower.train_stages.record_io import RecordSet
from regiontower.train_stages.records import Record, Region

GRID, CELL = 7, SIDE // 7  # patches a side of the tower's 56 px, and pixels of a patch in a sheet


def grid_of(sheet: Image.Image, left: int, top: int = 0) -> np.ndarray:
    """The colours `(7, 7, 3)` of a picture of patches in a sheet; each patch is one flat square."""
    picture = np.asarray(sheet)[top : top + SIDE, left : left + SIDE].astype(int)
    cells = picture.reshape(GRID, CELL, GRID, CELL, 3).transpose(0, 2, 1, 3, 4)
    assert np.ptp(cells.reshape(GRID, GRID, -1, 3), axis=2).max() == 0
    return cells[:, :, 0, 0]


@pytest.fixture(scope="module")
def marked(tmp_path_factory):
    """Two gray pictures with a noisy square each, on the patches of rows 3-5 and columns 1-3, and the other way round;
    between them one without regions."""
    folder, rng, records = tmp_path_factory.mktemp("marked"), np.random.default_rng(0), []
    for number, box in enumerate(((8, 24, 32, 48), None, (24, 8, 48, 32))):
        picture = np.full((56, 56, 3), 120, dtype=np.uint8)
        if box is not None:
            picture[box[1] : box[3], box[0] : box[2]] = rng.integers(0, 256, (24, 24, 3))
        Image.fromarray(picture).save(folder / f"{number}.png")
        regions = [] if box is None else [Region(box_xyxy=box)]
        records.append(Record(image=f"{number}.png", width=56, height=56, regions=regions))
    return PixelCache.build(RecordSet(folder / "records.jsonl", folder, records), 56, progress=False)


def test_two_kinds_of_tokens_get_two_colours():
    torch.manual_seed(0)
    centres, kind = torch.randn(2, 32), torch.arange(2 * 30).view(2, 30) % 2
    colours = token_colours(centres[kind])
    assert colours.shape == (2, 30, 3) and colours.min() >= 0 and colours.max() <= 1
    first, second = colours[kind == 0], colours[kind == 1]
    assert (first - first.mean(dim=0)).abs().max() < 0.05 and (second - second.mean(dim=0)).abs().max() < 0.05
    assert (first.mean(dim=0) - second.mean(dim=0)).abs().max() > 0.9
    noisy = token_colours(centres[kind] + 0.1 * torch.randn(2, 30, 32))[..., 0]  # red is the largest component
    low, high = sorted((noisy[kind == 0], noisy[kind == 1]), key=lambda reds: reds.mean())
    assert high.min() - low.max() > 0.5


def test_the_cosine_is_that_to_the_first_and_the_largest_is_bright():
    embeds = torch.tensor([[2.0, 0.0], [0.0, 5.0], [3.0, 3.0], [-1.0, 0.0], [0.1, 0.0]])
    cosine = cosine_to_first(embeds)
    torch.testing.assert_close(cosine, torch.tensor([0.0, 0.5**0.5, -1.0, 1.0]))
    colours = heat_colours(cosine.view(2, 2))
    assert colours.shape == (2, 2, 3)
    red, green, blue = colours[1, 1]
    assert red > 0.9 and green > 0.8 and blue < 0.2  # yellow
    red, green, blue = colours[1, 0]
    assert red < 0.3 and green < 0.1 and blue > 0.25  # dark blue
    assert np.isfinite(heat_colours(torch.ones(2, 2))).all()


def test_patches_have_boxes_around_them():
    boxes = patch_boxes((2, 3), 10).view(2, 3, 4)
    assert boxes[0, 0].tolist() == [0, 0, 20, 20]
    assert boxes[1, 1].tolist() == [0, 0, 30, 20]
    assert torch.equal(patch_boxes((2, 3), 10, around=1).view(2, 3, 4)[1, 2], torch.tensor([20.0, 10, 30, 20]))


@pytest.mark.parametrize("readout", ["own", "roi"])
def test_a_region_is_most_like_itself(rice_tower, marked, readout):
    sheet = similarity_sheet(reading_tower(rice_tower, readout), marked, [0, 1, 2])
    for number, middle in enumerate(((4, 2), (2, 4))):  # row and column; the picture without a region is left out
        heat = grid_of(sheet, number * (2 * SIDE + 3 * GAP) + SIDE + GAP)
        brightest = np.unravel_index(heat[..., :2].sum(axis=2).argmax(), (GRID, GRID))
        assert brightest == middle
        far = heat[0, 6] if number == 0 else heat[6, 0]
        assert far[:2].sum() < 0.7 * heat[middle][:2].sum()


def test_tokens_stand_where_their_patches_are(rice_tower, marked):
    sheet = pca_sheet(rice_tower, marked, [0, 2])
    for number, (rows, columns) in enumerate(((slice(3, 6), slice(1, 4)), (slice(1, 4), slice(3, 6)))):
        left = number * (2 * SIDE + 3 * GAP)
        picture = np.asarray(sheet)[:SIDE, left : left + SIDE].astype(int)
        shown = np.abs(picture - 120).reshape(GRID, CELL, GRID, CELL, 3).mean(axis=(1, 3, 4))
        square = np.zeros((GRID, GRID), dtype=bool)
        square[rows, columns] = True
        assert shown[square].min() > shown[~square].max()
        # All of the gray has tokens that are alike, and a noisy patch has one that is like none of them.
        tokens = grid_of(sheet, left + SIDE + GAP)
        away = np.abs(tokens - np.median(tokens[~square], axis=0)).max(axis=2)
        assert np.median(away[square]) > 2 * np.median(away[~square])
