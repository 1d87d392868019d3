"""Towers that know nothing of texts or regions: DINOv2, DINOv3 and AIMv2."""

import numpy as np
import pytest
import torch
from torchvision.ops import roi_align
from transformers import (
    Aimv2VisionConfig,
    Aimv2VisionModel,
    Dinov2Config,
    Dinov2Model,
    DINOv3ViTConfig,
    DINOv3ViTModel,
)

from regiontower.eval.probe import LitConfig, ProbeConfig, probe
from regiontower.eval.probe.regions import labelled_regions, reader
from regiontower.train_stages.clip_objective import ClipConfig
from regiontower.train_stages.normalise import PixelNorm
from regiontower.train_stages.record_io import write_records
from regiontower.vision_towers import describe_tower, load_tower

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 56, "patch_size": 8}
TOWERS = {  # with the tokens that stand before the patches
    "dinov2": (Dinov2Model, Dinov2Config, {"mlp_ratio": 2}, 1),
    "dinov3": (DINOv3ViTModel, DINOv3ViTConfig, {"num_register_tokens": 3, "intermediate_size": 64}, 4),
    "aimv2": (Aimv2VisionModel, Aimv2VisionConfig, {"intermediate_size": 64}, 0),
}


@pytest.fixture(params=list(TOWERS))
def tower(request, tmp_path):
    """A random native tower, its folder, and how many tokens stand before its patches."""
    model_class, config_class, fields, prefix = TOWERS[request.param]
    torch.manual_seed(0)
    model = model_class(config_class(**SIZES, **fields)).eval()
    for weight in model.parameters():
        weight.data += 0.05 * torch.randn_like(weight)
    model.save_pretrained(tmp_path)
    return model, tmp_path, prefix


def test_their_regions_are_probed(tower, square_records):
    records = square_records(60, 5)
    write_records(records.path, records.records)
    config = ProbeConfig("tags", ("own", "roi"))
    results = probe(tower[1], records.path, config=config, device="cpu")
    own = results["readouts"]["own"]
    assert own == results["readouts"]["roi"]  # RoIAlign is all that they have
    assert own["linear"]["n"] == own["knn"]["n"] == 12 and results["images"] == {}
    assert own["linear"]["value"] > own["majority"]["value"]  # colours of squares reach the tokens of any tower
    assert not [name for name in own if "zero_shot" in name or "text" in name]


def test_they_get_texts_for_regions_and_images(tower, square_records, tiny_tokenizer, tmp_path_factory):
    records, words = square_records(20, 5), tmp_path_factory.mktemp("tokenizer")
    write_records(records.path, records.records)
    tiny_tokenizer.save_pretrained(words)
    sizes = ClipConfig(embed_dim=24, text_hidden=32, text_layers=1, text_heads=2, max_tokens=16)
    config = ProbeConfig("tags", lit=LitConfig(2, text=sizes))
    results = probe(tower[1], records.path, tokenizer=words, config=config, device="cpu")
    assert {"lit_zero_shot", "lit_text_to_region_r10"} <= set(results["readouts"]["own"])
    assert results["images"]["lit_image_to_text_r1"]["n"] == 4 and "lit_text_to_image_r10" in results["images"]


@torch.inference_mode()
def test_their_regions_are_means_of_patch_tokens(tower, squares):
    model, folder, prefix = tower
    cache, lifted = squares(3, 2), load_tower(folder)
    found = labelled_regions(reader(lifted, "own"), cache, lambda record: [0, 1])
    spec = describe_tower(model.config)
    pixels = PixelNorm(spec.image_mean, spec.image_std)(torch.from_numpy(np.array(cache.pixels)))
    tokens = model(pixels, output_hidden_states=True).hidden_states[-1]
    assert tokens.shape[1] == prefix + 49
    patches = tokens[:, prefix:].transpose(1, 2).unflatten(2, (7, 7))
    boxes = [torch.tensor([region.box_xyxy for region in record.regions]) for record in cache.records]
    expected = roi_align(patches, boxes, (7, 7), spatial_scale=1 / 8, aligned=True).mean((2, 3))
    torch.testing.assert_close(torch.from_numpy(found.features), expected, atol=1e-4, rtol=1e-4)
