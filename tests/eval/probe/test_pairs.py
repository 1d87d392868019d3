"""Texts of UMG-CLIP and of native CLIP and SigLIP pairs."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import CLIPModel, PreTrainedTokenizerFast, SiglipModel

from regiontower.eval.probe.labels import object_labels
from regiontower.eval.probe.mask_regions import dense_tower, mask_regions
from regiontower.eval.probe.regions import labelled_regions, reader
from regiontower.eval.probe.text_side import open_with_texts
from regiontower.eval.probe.zero_shot import in_space
from regiontower.train_stages.mask_coverage import patch_coverage
from regiontower.train_stages.normalise import PixelNorm
from regiontower.train_stages.region_labels import ObjectClasses
from regiontower.vision_towers import UmgClipVisionModel, UserError, load_umg_clip

NAMES = ["blue square", "green square", "red square"]
LABELS = object_labels(ObjectClasses(NAMES, "tags", stuff=True))


def normed(tower, cache, row):
    return PixelNorm(tower.spec.image_mean, tower.spec.image_std)(
        torch.from_numpy(np.array(cache.pixels[row : row + 1]))
    )


@torch.inference_mode()
def test_texts_and_images_are_those_of_the_native_pair(pair):
    kind, folder = pair
    native = (CLIPModel if kind == "clip" else SiglipModel).from_pretrained(folder).eval()
    tower, side = open_with_texts(folder)
    assert isinstance(tower, UmgClipVisionModel) and side is not None
    # As the tokenizer itself frames a text; SigLIP's texts are padded to the length that it was trained with.
    ids = {"clip": [[1, 4, 7, 3], [1, 8, 9, 10, 11, 3]], "siglip": [[4, 7, 3], [8, 9, 10, 11, 3]]}[kind]
    asked = side.texts(["red square", "a much longer text"])
    for row, found in zip(ids, asked, strict=True):
        padded = torch.tensor([row + [0] * (0 if kind == "clip" else 8 - len(row))])
        expected = native.get_text_features(input_ids=padded).pooler_output[0]
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    pixels = torch.randn(2, 3, 56, 56)
    expected = native.get_image_features(pixel_values=pixels).pooler_output
    torch.testing.assert_close(side.images(pixels), expected, atol=1e-5, rtol=1e-4)


@torch.inference_mode()
def test_regions_and_masks_are_the_models_own(pair, masked):
    kind, folder = pair
    model = load_umg_clip(folder, dtype=torch.float32)
    tower, side = open_with_texts(folder)
    pooling = {"clip": "value", "siglip": "map"}[kind]
    assert set(side.regions) == {"own", pooling, "crops"}
    found = labelled_regions(reader(tower, "own"), masked, LABELS)
    by_mask = mask_regions(dense_tower(tower, "own"), masked, LABELS)
    assert by_mask.classes.tolist() == found.classes.tolist() and by_mask.images.tolist() == list(range(5))
    for row, record in enumerate(masked.records):
        pixels, region = normed(tower, masked, row), record.regions[0]
        box = model.encode_regions(pixels, torch.tensor([[region.box_xyxy]]))[0]
        torch.testing.assert_close(in_space(found, side, "own")[row], F.normalize(box, dim=-1)[0], atol=1e-4, rtol=1e-3)
        share = torch.from_numpy(patch_coverage(region.mask, masked.frames[row], 14))[None, None]
        mask = model.encode_masks(pixels, share)[0]
        torch.testing.assert_close(
            in_space(by_mask, side, "own")[row], F.normalize(mask, dim=-1)[0], atol=1e-4, rtol=1e-3
        )
    same = labelled_regions(reader(tower, pooling), masked, LABELS)
    np.testing.assert_allclose(same.features, found.features, atol=1e-5)
    assert dense_tower(tower, "crops") is None and dense_tower(tower, "roi") is None


def test_a_finished_umg_clip_run_is_opened_with_its_texts(pair, tmp_path):
    """Saved as `pretrain` saves it: another tower of the same kind, with pooling fields of its own."""
    _, folder = pair
    model = load_umg_clip(folder, roi_size=2)
    model.save_pretrained(tmp_path)
    PreTrainedTokenizerFast.from_pretrained(folder).save_pretrained(tmp_path)
    tower, side = open_with_texts(tmp_path)
    assert tower.config.roi_size == 2
    native = open_with_texts(folder)[1]
    torch.testing.assert_close(side.texts(NAMES), native.texts(NAMES))


def test_a_siglip_without_its_head_has_no_crops(pair, tmp_path):
    kind, folder = pair
    if kind != "siglip":
        pytest.skip("a CLIP always pools")
    config = SiglipModel.from_pretrained(folder).config
    config.vision_config.vision_use_head = False
    SiglipModel(config).save_pretrained(tmp_path)
    PreTrainedTokenizerFast.from_pretrained(folder).save_pretrained(tmp_path)
    side = open_with_texts(tmp_path)[1]
    assert set(side.regions) == {"own", "value"} and side.images(torch.zeros(1, 3, 56, 56)).shape == (1, 32)


def test_a_pair_without_its_tokenizer_is_one_sentence(pair, tmp_path):
    load_umg_clip(pair[1]).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="tokenizer"):
        open_with_texts(tmp_path)


def test_masks_that_nobody_has_give_no_region(pair, squares):
    tower, _ = open_with_texts(pair[1])
    assert len(mask_regions(dense_tower(tower, "own"), squares(2, 1), LABELS)) == 0
