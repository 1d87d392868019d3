"""The covered share of each patch against a twin that adds up the overlaps pixel by pixel."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from regiontower.mllm.boxes import Boxes, ImageFrame
from regiontower.train_stages.augment import AugmentConfig, random_view
from regiontower.train_stages.mask_coverage import patch_coverage
from regiontower.train_stages.masks import encode_mask
from regiontower.train_stages.records import Mask


def covered(mask, frame, patch):
    return patch_coverage(Mask(**encode_mask(mask)), frame, patch)


def overlap(a, b, c, d):
    return max(0.0, min(b, d) - max(a, c))


def twin(mask, frame, patch):
    """By loops over patches and pixels."""
    (sx, sy), (ox, oy) = frame.scale, frame.offset
    shares = np.zeros((frame.input_size[1] // patch, frame.input_size[0] // patch))
    for (row, column), _ in np.ndenumerate(shares):
        for y, x in np.argwhere(mask):
            high = overlap(y * sy + oy, (y + 1) * sy + oy, row * patch, (row + 1) * patch)
            wide = overlap(x * sx + ox, (x + 1) * sx + ox, column * patch, (column + 1) * patch)
            shares[row, column] += high * wide / patch**2
    return shares


@settings(max_examples=40)
@given(st.integers(3, 14), st.integers(3, 14), st.integers(0, 10**6))
def test_equals_the_sum_of_overlaps(width, height, seed):
    rng = np.random.default_rng(seed)
    mask = rng.random((height, width)) < rng.choice([0.05, 0.5, 0.95, 1.0])  # also runs through several columns
    mask[rng.integers(height), rng.integers(width)] = True
    frame = ImageFrame.letterbox((width, height), 16)
    np.testing.assert_allclose(covered(mask, frame, 4), twin(mask, frame, 4), atol=1e-6)
    left, top, side = rng.integers(0, 6), rng.integers(0, 6), rng.integers(5, 11)
    crop = ImageFrame.crop((16, 16), (left, top, left + side, top + side), (12, 12))
    scale = tuple(a * b for a, b in zip(frame.scale, crop.scale, strict=True))
    offset = tuple(o * s + p for o, s, p in zip(frame.offset, crop.scale, crop.offset, strict=True))
    seen = ImageFrame((width, height), (12, 12), scale, offset, frame.visible_xyxy)
    np.testing.assert_allclose(covered(mask, seen, 4), twin(mask, seen, 4), atol=1e-6)


def test_a_frame_without_change_counts_pixels():
    mask = np.random.default_rng(0).random((8, 12)) < 0.5
    expected = mask.reshape(2, 4, 3, 4).mean((1, 3))
    np.testing.assert_allclose(covered(mask, ImageFrame.identity((12, 8)), 4), expected)


@pytest.mark.parametrize("seed", range(20))
def test_masks_follow_the_view_of_their_box(seed):
    """White on black: the mask's shares in a random view are the view's brightness, patch by patch."""
    import torch

    rng = np.random.default_rng(seed)
    mask = np.zeros((56, 56), bool)
    x, y = rng.integers(0, 30, 2)
    mask[y : y + 20, x : x + 25] = rng.random((20, 25)) < 0.9
    mask[y, x] = mask[y + 19, x + 24] = True
    pixels = torch.from_numpy(np.repeat(mask[None], 3, 0).astype(np.uint8) * 255)
    config = AugmentConfig(0.6, 0.0, 0.0, zoom=0.5, zoom_max=1.8)
    view = random_view(pixels, Boxes([[x, y, x + 25, y + 20]]), config, rng, 28)
    shares = covered(mask, view.frame, 7)
    bright = view.pixels[0].float().numpy().reshape(4, 7, 4, 7).mean((1, 3)) / 255
    np.testing.assert_allclose(shares, bright, atol=0.1)  # resampled pixels blur over the edge of a patch
    assert abs(shares.mean() - bright.mean()) < 0.02
