"""The whole probe, from records to figures and pictures."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from regiontower.eval.probe import DetectConfig, LitConfig, ProbeConfig, probe, probe_table
from regiontower.eval.probe.pictures import GAP, SIDE
from regiontower.eval.probe.run import enough, shared_images, split
from regiontower.train_stages.clip_objective import ClipConfig
from regiontower.train_stages.masks import polygons_to_mask
from regiontower.train_stages.pretrain_heads import vocabulary_hash
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
    first = Image.open(data.image_path(data.records[4])).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    for name in ("tokens.png", "similarity.png"):
        sheet = np.asarray(Image.open(tmp_path / "out" / name)).astype(int)
        assert sheet.shape == (2 * (SIDE + GAP), 3 * (2 * SIDE + 3 * GAP), 3)
        beside = np.abs(sheet[:SIDE, :SIDE] - np.asarray(first)).max(axis=2)
        assert (beside == 0).mean() > 0.9  # a box may be drawn into it
        patches = sheet[:SIDE, SIDE + GAP : 2 * SIDE + GAP].reshape(7, 32, 7, 32, 3)
        assert np.ptp(patches, axis=(1, 3)).max() == 0 < np.ptp(patches)  # a colour for each of 7 x 7 patches
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
    assert not {"zero_shot", "text_to_region_r1"} & set(found)
    assert results["images"]["lit_image_to_text_r1"]["n"] == 12
    assert all(name.startswith("lit_") for name in results["images"])
    captions = data.root / "captions.jsonl"
    write_records(captions, [record.model_copy(update={"regions": []}) for record in data.records[:7]])
    config = replace(config, lit=replace(config.lit, steps=2), detect=None)
    alone = probe(
        tmp_path / "tower", data.path, captions, tokenizer=tmp_path / "tokenizer", config=config, device="cpu"
    )
    assert alone["readouts"] == {"crops": {}} and alone["images"]["lit_image_to_text_r1"]["n"] == 7
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


def test_all_records_of_an_image_are_on_one_side(data):
    twice = [record for record in data.records[:10] for _ in range(3)]
    known, asked = split(replace(data, records=twice))
    assert [record.image for record in asked.records] == ["4.png"] * 3 + ["9.png"] * 3
    assert shared_images(known, asked) == 0 and len(known) == 24


def test_images_that_are_learned_from_and_asked_are_said(rice_tower, data, tmp_path):
    rice_tower.save_pretrained(tmp_path)
    both = data.root / "both.jsonl"
    write_records(both, data.records[:7])
    results = probe(tmp_path, data.path, both, config=ProbeConfig("tags", train_regions=30), device="cpu")
    assert results["train_images"] == 30 and results["shared_images"] == 4  # every other one
    assert "4 images of the test are learned from, too" in probe_table(results)


def test_of_many_images_some_are_taken_evenly(data):
    assert enough(data, "tags", 60) is data
    few = enough(data, "tags", 6)
    assert [record.image for record in few.records] == ["0.png", "12.png", "24.png", "35.png", "47.png", "59.png"]
    bare = replace(data, records=[r.model_copy(update={"regions": []}) for r in data.records])
    assert enough(bare, "tags", 1) is bare


def test_images_with_texts_need_no_regions_to_be_measured(pair, data, tmp_path):
    """As in COCO's captions, ImageNet's folders and Flickr30k, whose regions have tags and no category."""
    without = [r.regions[0].model_copy(update={"category": None, "ocr": None}) for r in data.records]
    flickr = [r.model_copy(update={"regions": [bare]}) for r, bare in zip(data.records, without, strict=True)]
    named = [
        r.model_copy(update={"regions": [], "captions": [], "tags": [text]})
        for r, text in zip(data.records, ("red", "blue", "green") * 20, strict=True)
    ]
    for records, there, absent in (
        (flickr, "image_to_text_r1", "image_zero_shot_top1"),
        (named, "image_zero_shot_top5", "image_to_text_r1"),
    ):
        path = data.root / f"{there}.jsonl"
        write_records(path, records)
        results = probe(pair[1], path, device="cpu")
        assert results["classes"] == 0 and results["images"][there]["n"] == 12 and absent not in results["images"]
    assert results["readouts"] == {"own": {}} and results["images"]["image_zero_shot_top5"]["value"] == 1


def test_the_number_of_a_cluster_is_no_text(pair, data):
    clusters = [
        r.model_copy(update={"regions": [r.regions[0].model_copy(update={"cluster": n % 2})]})
        for n, r in enumerate(data.records)
    ]
    write_records(data.root / "clusters.jsonl", clusters)
    config = ProbeConfig("cluster", ("own",))
    own = probe(pair[1], data.root / "clusters.jsonl", config=config, device="cpu")["readouts"]["own"]
    assert own["knn"]["n"] == 12 and not [name for name in own if name.startswith("zero_shot")]


def test_a_size_that_the_tower_cannot_take_is_one_sentence(cloc_folder, data):
    with pytest.raises(UserError, match="cannot take 57 px"):
        probe(cloc_folder, data.path, config=ProbeConfig(side=57), device="cpu")


def test_a_test_in_which_nothing_can_be_measured_is_refused(rice_tower, cloc_folder, data, tmp_path):
    rice_tower.save_pretrained(tmp_path / "tower")
    asked = {"config": ProbeConfig("tags"), "image_root": data.root, "device": "cpu", "out": tmp_path / "out"}
    bare = [r.model_copy(update={"regions": []}) for r in data.records[:5]]
    write_records(tmp_path / "captions.jsonl", bare)
    write_records(tmp_path / "bare.jsonl", [r.model_copy(update={"captions": []}) for r in bare])
    with pytest.raises(UserError, match=r"captions.jsonl: the records of the test have no regions: nothing"):
        probe(tmp_path / "tower", data.path, tmp_path / "captions.jsonl", **asked)
    with pytest.raises(UserError, match="have no regions, captions or tags: nothing"):
        probe(cloc_folder, data.path, tmp_path / "bare.jsonl", **asked)
    unknown = [
        r.model_copy(update={"regions": [r.regions[0].model_copy(update={"tags": [], "category": "cat"})]})
        for r in data.records[:5]
    ]
    write_records(tmp_path / "unknown.jsonl", unknown)
    with pytest.raises(UserError, match=r"no region of the 5 images of the test has a class \(tags\)"):
        probe(tmp_path / "tower", data.path, tmp_path / "unknown.jsonl", **asked)
    assert not (tmp_path / "out").exists()
    # A tower with texts has captions to find.
    results = probe(cloc_folder, data.path, tmp_path / "captions.jsonl", **asked)
    assert results["readouts"] == {"own": {}} and results["images"]["image_to_text_r1"]["n"] == 5


def test_a_tokenizer_is_the_option_that_named_it(rice_tower, data, tmp_path):
    rice_tower.save_pretrained(tmp_path / "tower")
    with pytest.raises(UserError, match="give --tokenizer the folder of one"):
        probe(tmp_path / "tower", data.path, tokenizer=tmp_path / "nothing", device="cpu")


def test_text_centres_are_read_with_their_own_vocabulary(rice_tower, data, tmp_path):
    words = ["<pad>", "red", "green", "blue", "square"]
    tokenizers = {}
    for name, order in (("own", words), ("other", words[:1] + words[:0:-1])):
        inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(order)}, "<pad>"))
        inner.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizers[name] = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>")
        tokenizers[name].save_pretrained(tmp_path / name)
    run = tmp_path / "run"
    rice_tower.save_pretrained(run)
    save_file({"ocr": torch.randn(len(words), 64)}, run / "centres.safetensors")
    (run / "stage.json").write_text(json.dumps({"data": {"tokenizer": vocabulary_hash(tokenizers["own"])}}))
    asked = {"config": ProbeConfig("tags"), "device": "cpu"}
    with pytest.raises(UserError, match="trained with another vocabulary"):
        probe(run, data.path, tokenizer=tmp_path / "other", **asked)
    found = probe(run, data.path, tokenizer=tmp_path / "own", **asked)
    assert found["readouts"]["own"]["reading_tokens"]["n"] == 12
    for stage in ("{}", '{"data": {}}'):  # a run that does not know its vocabulary
        (run / "stage.json").write_text(stage)
        assert "reading_tokens" in probe(run, data.path, tokenizer=tmp_path / "other", **asked)["readouts"]["own"]


def test_classes_are_read_by_templates(pair, data, rice_tower, tmp_path):
    tagged = [r.model_copy(update={"tags": r.regions[0].tags}) for r in data.records]
    write_records(data.root / "tagged.jsonl", tagged)
    asked = {"device": "cpu"}
    names = probe(pair[1], data.root / "tagged.jsonl", config=ProbeConfig("tags"), **asked)
    by_template = ProbeConfig("tags", templates=("a {}", "much longer text {}"))
    found = probe(pair[1], data.root / "tagged.jsonl", config=by_template, **asked)
    assert (names["templates"], found["templates"]) == (0, 2) and "by 2 templates" in probe_table(found)
    changed = {"zero_shot", "image_zero_shot_top1", "image_zero_shot_top5"}
    for place in (lambda results: results["readouts"]["own"], lambda results: results["images"]):
        before, after = place(names), place(found)
        assert {n: row for n, row in before.items() if n not in changed} == {
            n: row for n, row in after.items() if n not in changed
        }
    rice_tower.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="has no texts"):
        probe(tmp_path, data.path, config=by_template, **asked)
