"""The whole probe, from records to figures and pictures."""

import json
from dataclasses import replace

import pytest
import torch
from PIL import Image

from regiontower.eval.probe import DetectConfig, LitConfig, ProbeConfig, probe, probe_table
from regiontower.eval.probe.pictures import patch_boxes
from regiontower.eval.probe.run import split
from regiontower.train_stages.clip_objective import ClipConfig
from regiontower.train_stages.masks import polygons_to_mask
from regiontower.train_stages.record_io import write_records
from regiontower.train_stages.records import Mask
from regiontower.vision_towers import UserError


@pytest.fixture(scope="module")
def data(square_records):
    records = square_records(60, 5)
    write_records(records.path, records.records)
    return records


def test_a_probe_finds_the_colours_of_squares(cloc_folder, data, tmp_path):
    config = ProbeConfig("tags", ("own", "crops"))
    results = probe(cloc_folder, data.path, out=tmp_path / "out", config=config, device="cpu")
    assert json.loads((tmp_path / "out" / "probe.json").read_text()) == results
    assert results["train_images"] == 48 and results["test_images"] == 12 and results["classes"] == 3
    own, crops = results["readouts"]["own"], results["readouts"]["crops"]
    assert crops["linear"]["value"] > 0.9 > own["majority"]["value"]  # a colour survives in a tower that knows nothing
    assert {"knn", "reading_linear", "zero_shot", "text_to_region_r1", "region_to_text_r10"} <= set(own)
    assert "zero_shot" not in crops  # a crop's pooled feature is not what this tower's texts were trained with
    assert {"image_to_text_r1", "text_box_acc50"} <= set(results["images"])
    for name in ("tokens.png", "similarity.png"):
        picture = Image.open(tmp_path / "out" / name)
        assert picture.width > 600 and len(set(picture.getdata())) > 50
    table = probe_table(results)
    assert "own     linear" in table and "n = 12" in table


def test_a_tower_without_texts_gets_some_that_are_marked(rice_tower, tiny_tokenizer, data, tmp_path):
    rice_tower.save_pretrained(tmp_path / "tower")
    tiny_tokenizer.save_pretrained(tmp_path / "tokenizer")
    sizes = ClipConfig(embed_dim=24, text_hidden=32, text_layers=1, text_heads=2, max_tokens=16)
    config = ProbeConfig("tags", ("crops",), lit=LitConfig(60, text=sizes), detect=DetectConfig(1, width=32))
    with pytest.raises(UserError, match="give --tokenizer"):
        probe(tmp_path / "tower", data.path, config=config, device="cpu")
    results = probe(tmp_path / "tower", data.path, tokenizer=tmp_path / "tokenizer", config=config, device="cpu")
    found = results["readouts"]["crops"]
    assert found["lit_zero_shot"]["value"] > 0.8 and found["lit_text_to_region_r1"]["n"] == 6
    assert not {"zero_shot", "text_to_region_r1"} & set(found) and results["images"] == {}
    assert results["detection"]["n"] == 12 and "detection after 1 steps" in probe_table(results)


def test_a_pair_reads_regions_by_their_masks_too(pair, data, tmp_path):
    def whole(region):
        x0, y0, x1, y1 = region.box_xyxy
        return region.model_copy(update={"mask": Mask(**polygons_to_mask([[x0, y0, x1, y0, x1, y1, x0, y1]], 56, 56))})

    masked = [r.model_copy(update={"regions": [whole(region) for region in r.regions]}) for r in data.records]
    path = data.root / "masked.jsonl"
    write_records(path, masked)
    config = ProbeConfig("tags", ("own", "roi"))
    results = probe(pair[1], path, out=tmp_path, config=config, device="cpu")
    own, roi = results["readouts"]["own"], results["readouts"]["roi"]
    assert own["zero_shot_masks"]["n"] == own["zero_shot"]["n"] == 12
    assert "zero_shot" not in roi and "zero_shot_masks" not in roi
    assert {"image_to_text_r1", "text_to_image_r10"} <= set(results["images"])
    assert "zero_shot_masks" not in probe(pair[1], data.path, config=config, device="cpu")["readouts"]["own"]


def test_records_are_split_by_what_they_say_or_every_fifth(data):
    known, asked = split(data)
    assert len(known) == 48 and asked.records == data.records[4::5]
    said = [r.model_copy(update={"split": "val" if n < 3 else "train"}) for n, r in enumerate(data.records)]
    known, asked = split(replace(data, records=said))
    assert asked.records == said[:3] and known.records == said[3:]
    with pytest.raises(UserError, match="give --test"):
        split(replace(data, records=said[:3]))


def test_a_size_that_the_tower_cannot_take_is_one_sentence(cloc_folder, data):
    with pytest.raises(UserError, match="cannot take 57 px"):
        probe(cloc_folder, data.path, config=ProbeConfig(side=57), device="cpu")


def test_patches_have_boxes_around_them():
    boxes = patch_boxes((2, 3), 10).view(2, 3, 4)
    assert boxes[0, 0].tolist() == [0, 0, 20, 20]
    assert boxes[1, 1].tolist() == [0, 0, 30, 20]
    assert torch.equal(patch_boxes((2, 3), 10, around=1).view(2, 3, 4)[1, 2], torch.tensor([20.0, 10, 30, 20]))
