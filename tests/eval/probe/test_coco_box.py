"""The two protocols of COCO boxes, beside slow twins."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.ops import roi_align

from regiontower.eval.probe import CocoBoxConfig, classify_coco_boxes, coco_box_table, read_templates
from regiontower.eval.probe.coco_box import candidates, in_area, labels_of, protocol_side
from regiontower.eval.probe.enlarged_crops import enlarged, enlarged_crops
from regiontower.eval.probe.prompts import TEMPLATES, class_texts, read_classes
from regiontower.eval.probe.ranked import class_mean, class_mean_top, micro_top, ranks
from regiontower.eval.probe.text_side import open_with_texts
from regiontower.eval.probe.views import stretched
from regiontower.train_stages.masks import encode_mask
from regiontower.train_stages.normalise import PixelNorm
from regiontower.train_stages.pixels import PixelCache
from regiontower.train_stages.record_io import RecordSet, write_records
from regiontower.train_stages.records import Mask, Record, Region
from regiontower.vision_towers import UserError, describe_tower, load_umg_clip

COLORS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


@pytest.fixture(scope="module")
def panoptic(tmp_path_factory):
    """Six wide pictures with a thing (and its mask), a smaller one of 7 px, which the area leaves out, and, but for the
    last one, stuff below."""
    folder = tmp_path_factory.mktemp("panoptic")
    rng, records = np.random.default_rng(0), []
    for number in range(6):
        picture = Image.new("RGB", (112, 70), (90, 90, 90))
        things = rng.permutation(["red", "green"])[:2].tolist()
        boxes = [(4 + number, 6, 40 + number, 30), (60, 10, 67, 17)]
        regions = []
        for name, box in zip(things, boxes, strict=True):
            picture.paste(COLORS[name], box)
            regions.append(Region(box_xyxy=box, category=name, mask=mask_of((70, 112), box)))
        floor = (0, 48, 112, 70)
        picture.paste(COLORS["blue"], floor)
        if number < 5:
            regions.append(Region(box_xyxy=floor, category="blue", stuff=True, mask=mask_of((70, 112), floor)))
        picture.save(folder / f"{number}.png")
        records.append(Record(image=f"{number}.png", width=112, height=70, regions=regions))
    found = RecordSet(folder / "records.jsonl", folder, records)
    write_records(found.path, records)
    return found


def mask_of(shape, box):
    inside = np.zeros(shape, dtype=bool)
    inside[box[1] : box[3], box[0] : box[2]] = True
    return Mask(**encode_mask(inside))


def random_ranks(seed, rows=80, classes=9):
    rng = np.random.default_rng(seed)
    similarity = rng.permutation(rows * classes).reshape(rows, classes) / (rows * classes)  # no two are equal
    labels = rng.choice(classes, rows, p=np.arange(1, classes + 1) / np.arange(1, classes + 1).sum())
    return similarity, labels, np.sort(rng.integers(0, 20, rows))


@pytest.mark.parametrize("seed", range(4))
def test_top_k_is_what_a_slow_search_finds(seed):
    similarity, labels, images = random_ranks(seed)
    ranked = ranks(torch.from_numpy(similarity), labels)
    for k in (1, 5):
        hits = [label in sorted(range(9), key=lambda c, i=i: -similarity[i, c])[:k] for i, label in enumerate(labels)]
        of_class = [np.mean([h for h, own in zip(hits, labels, strict=True) if own == c]) for c in sorted(set(labels))]
        micro, mean = micro_top(ranked, images)[f"top{k}"], class_mean_top(ranked, images, labels)[f"top{k}"]
        assert micro.value == pytest.approx(np.mean(hits)) and mean.value == pytest.approx(np.mean(of_class))
        assert micro.value != pytest.approx(mean.value)
        for found in (micro, mean):
            assert found.n == 80 and found.ci95[0] < found.value < found.ci95[1]


def test_a_model_that_says_the_same_of_all_recognises_nothing():
    labels = np.array([0, 1, 2])
    assert ranks(torch.ones(3, 4), labels).tolist() == [3, 3, 3]
    assert ranks(torch.full((3, 4), torch.nan), labels).tolist() == [3, 3, 3]
    assert class_mean(np.zeros(0, bool), np.zeros(0, int), np.zeros(0, int)).row() == {"n": 0}
    one_image = class_mean(np.array([True, False]), np.array([4, 4]), np.array([7, 7]))
    assert one_image.value == 0.5 and one_image.ci95[1] - one_image.ci95[0] > 0.5


def test_boxes_count_by_their_area():
    def region(width, height):
        return Region(box_xyxy=(0, 0, width, height))

    assert in_area(region(8, 8)) and in_area(region(4, 16)) and in_area(region(1024, 1024))
    assert not in_area(region(7.9, 8)) and not in_area(region(1024, 1024.1))


def test_a_box_is_enlarged_about_its_middle_and_cut_at_the_edge():
    assert enlarged((20, 30, 40, 34), 1.5, (100, 80)) == (15, 29, 45, 35)
    assert enlarged((0, 70, 40, 80), 1.5, (44, 80)) == (0, 67.5, 44, 80)


def test_candidates_are_categories_and_crowds_are_no_things(panoptic):
    assert candidates(panoptic.records, "clipself-macc") == ["blue", "green", "red"]
    assert candidates(panoptic.records, "fgclip-acc") == ["green", "red"]
    names, record = ["blue", "green", "red"], panoptic.records[0]
    things = labels_of(names, lambda region: not region.stuff and in_area(region))(record)
    assert things[0] == names.index(record.regions[0].category) and things[1:] == [-1, -1]
    assert labels_of(names, lambda region: region.stuff)(record) == [-1, -1, 0]
    with pytest.raises(UserError, match="category"):
        candidates([Record(image="a", width=9, height=9)], "fgclip-acc")


def test_the_text_of_a_class_is_the_mean_over_templates():
    rows = {"a x.": [3.0, 0.0], "the x": [0.0, 5.0], "a y.": [0.0, 1.0], "the y": [0.0, 2.0]}
    found = class_texts(lambda texts: torch.tensor([rows[text] for text in texts]), ["x", "y"], ["a {}.", "the {}"])
    torch.testing.assert_close(found, torch.tensor([[0.5**0.5, 0.5**0.5], [0.0, 1.0]]))
    assert len(TEMPLATES) == len(set(TEMPLATES)) and all(template.count("{}") == 1 for template in TEMPLATES)


def test_templates_of_a_file(tmp_path):
    path = tmp_path / "templates.txt"
    path.write_text("a {}.\n\n  the {} \n", encoding="utf-8")
    assert read_templates(path) == ("a {}.", "the {}")
    for text, sentence in (("a thing\n", "line 1"), ("{} and {}\n", "once"), ("\n", "no template")):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match=sentence):
            read_templates(path)
    with pytest.raises(UserError, match="cannot be read"):
        read_templates(tmp_path / "nothing.txt")


def test_the_whole_image_is_stretched(panoptic):
    cache = stretched(panoptic, 56)
    assert cache.frames[0].scale == (0.5, 0.8) and len(cache) == 6
    x0, y0, x1, y1 = map(int, cache.frames[2].to_input(_boxes(panoptic.records[2]))[0].xyxy[0] + 0.5)
    inside = cache.pixels[2][:, y0 + 2 : y1 - 2, x0 + 2 : x1 - 2]
    color = COLORS[panoptic.records[2].regions[0].category]
    assert np.abs(inside - np.array(color)[:, None, None]).max() < 12


def test_candidates_of_a_file(panoptic, tmp_path):
    path = tmp_path / "classes.txt"
    path.write_text("red\n\n a cat \ngreen\nblue\n", encoding="utf-8")
    assert read_classes(path) == ("red", "a cat", "green", "blue")
    assert candidates(panoptic.records, "clipself-macc", path) == ["red", "a cat", "green", "blue"]
    path.write_text("green\nred\n", encoding="utf-8")
    assert candidates(panoptic.records, "fgclip-acc", path) == ["green", "red"]  # stuff is none of its boxes
    with pytest.raises(UserError, match=r"lacks 1 of the 3 categories that occur in the records, e\.g\. 'blue'"):
        candidates(panoptic.records, "clipself-macc", path)
    path.write_text("red\ngreen\nred\n", encoding="utf-8")
    with pytest.raises(UserError, match="line 3: 'red' stands in line 1 already"):
        read_classes(path)
    with pytest.raises(UserError, match="cannot be read"):
        read_classes(tmp_path / "nothing.txt")


def _boxes(record):
    from regiontower.mllm.boxes import Boxes

    return Boxes([region.box_xyxy for region in record.regions])


@torch.inference_mode()
def test_crops_show_the_enlarged_box_of_the_original(pair, panoptic):
    tower, _ = open_with_texts(pair[1])
    labels = labels_of(["blue", "green", "red"], lambda region: not region.stuff and in_area(region))
    cache = PixelCache.build(panoptic, 56, fill=(0, 0, 0), progress=False)
    found = enlarged_crops(tower, panoptic, cache, labels, 1.5, (0, 0, 0))
    assert found.images.tolist() == list(range(6))
    image = Image.open(panoptic.image_path(panoptic.records[3]))
    cut = image.crop((0, 0, 52, 36))  # of (7, 6, 43, 30): 36 x 24 becomes 54 x 36, from -2 and 0
    square = Image.new("RGB", (56, 56))
    square.paste(cut.resize((56, 39), Image.Resampling.BICUBIC), (0, 8))
    pixels = torch.from_numpy(np.array(square).transpose(2, 0, 1))[None]
    expected = tower(PixelNorm(tower.spec.image_mean, tower.spec.image_std)(pixels)).pooler_output[0]
    assert F.cosine_similarity(torch.from_numpy(found.features[3]), expected, dim=0) > 0.999


def test_the_protocols_count_what_they_say(pair, panoptic, tmp_path, monkeypatch):
    kind, folder = pair
    config = CocoBoxConfig("clipself-macc", ("own", {"clip": "value", "siglip": "map"}[kind]), templates=("a {}",))
    first = classify_coco_boxes(folder, panoptic.path, config, out=tmp_path, device="cpu")
    assert json.loads((tmp_path / "clipself-macc.json").read_text()) == first
    assert first["classes"] == 3 and first["classes_from"] == "records"
    assert first["side"] == 56 and first["resized_from"] is None
    own = first["readouts"]["own"]
    kinds = {"things_boxes": 6, "things_masks": 6, "stuff_masks": 5}
    assert {name: row["n"] for name, row in own.items()} == {f"{k}_top{t}": n for k, n in kinds.items() for t in (1, 5)}
    assert first["readouts"]["crops"]["things_crops_top1"]["n"] == 6
    for what, value in slow_clipself(folder, panoptic).items():
        assert own[f"{what}_top1"]["value"] == pytest.approx(value), what
    other = first["readouts"][config.readouts[1]]
    assert own == other  # the pair's own readout is this one
    assert "clipself-macc at 56 px, 3 classes that occur in the records by 1 templates" in coco_box_table(first)

    monkeypatch.setattr("regiontower.eval.probe.coco_box.IMAGES_AT_ONCE", 4)  # a part of four images and one of two
    assert classify_coco_boxes(folder, panoptic.path, config, device="cpu") == first

    second = classify_coco_boxes(folder, panoptic.path, CocoBoxConfig("fgclip-acc"), device="cpu")
    boxes = second["readouts"]["own"]["boxes_top1"]
    assert set(second["readouts"]) == {"own"} and boxes["n"] == 12 and second["classes"] == 2
    assert boxes["value"] == pytest.approx(slow_fgclip(folder, panoptic))
    assert second["readouts"]["own"]["boxes_top5"]["value"] == 1  # of two classes


def test_part_of_a_data_set_has_the_same_candidates_by_a_file(pair, panoptic, tmp_path):
    names = ["blue", "red", "a", "much", "longer", "text", "square", "green"]
    (tmp_path / "classes.txt").write_text("\n".join(names), encoding="utf-8")
    part = tmp_path / "part.jsonl"
    write_records(part, panoptic.records[5:])  # the only picture without stuff
    asked = {"format": "records", "image_root": panoptic.root, "device": "cpu"}
    config = CocoBoxConfig("fgclip-acc", templates=("{}",), classes=tmp_path / "classes.txt")
    found = classify_coco_boxes(pair[1], panoptic.path, config, device="cpu")
    assert found["classes"] == 8 and found["classes_from"] == str(tmp_path / "classes.txt")
    assert f"8 classes of {found['classes_from']}" in coco_box_table(found)
    boxes = found["readouts"]["own"]
    for k in (1, 5):
        slow = slow_fgclip(pair[1], panoptic, names, ("{}",), k=k)
        assert boxes[f"boxes_top{k}"]["value"] == pytest.approx(slow)
    of_part = classify_coco_boxes(pair[1], part, config, **asked)
    assert of_part["classes"] == 8 and of_part["images"] == 1
    everything = replace(config, protocol="clipself-macc", classes=None)
    assert classify_coco_boxes(pair[1], part, everything, **asked)["classes"] == 2
    assert classify_coco_boxes(pair[1], panoptic.path, everything, device="cpu")["classes"] == 3


def test_a_tower_of_one_size_is_resized_when_asked(pair, panoptic):
    small = classify_coco_boxes(pair[1], panoptic.path, CocoBoxConfig("clipself-macc"), device="cpu")
    large = classify_coco_boxes(pair[1], panoptic.path, CocoBoxConfig("clipself-macc", side=112), device="cpu")
    assert (small["side"], large["side"], large["resized_from"]) == (56, 112, 56)
    assert "at 112 px (resized from 56)" in coco_box_table(large)
    assert set(large["readouts"]["own"]) == set(small["readouts"]["own"])
    assert large["readouts"]["crops"] == small["readouts"]["crops"]  # they have the tower's own size
    config = CocoBoxConfig("fgclip-acc", side=112)
    boxes = classify_coco_boxes(pair[1], panoptic.path, config, device="cpu")["readouts"]["own"]["boxes_top1"]
    assert boxes["value"] == pytest.approx(slow_fgclip(pair[1], panoptic, pixels=112))


@torch.inference_mode()
def slow_fgclip(folder, records, names=("green", "red"), templates=TEMPLATES, pixels=56, k=1):
    """One box at a time, from the file to the class; transformers interpolates positions where it is larger."""
    model = load_umg_clip(folder, dtype=torch.float32)
    side = open_with_texts(folder)[1]
    spec, tower, right = model.vision_tower.spec, model.vision_tower, []
    texts = torch.stack([F.normalize(side.texts([t.format(n) for t in templates]), dim=-1).mean(0) for n in names])
    for record in records.records:
        image = Image.open(records.image_path(record)).resize((pixels, pixels), Image.Resampling.BICUBIC)
        normed = PixelNorm(spec.image_mean, spec.image_std)(torch.from_numpy(np.array(image).transpose(2, 0, 1))[None])
        for region in record.regions[:2]:
            box = torch.tensor(region.box_xyxy) * torch.tensor([pixels / 112, pixels / 70] * 2)
            seen = tower(normed, box[None, None], interpolate_pos_encoding=True)
            cosine = F.cosine_similarity(model.image_projection(seen.region_embeds[0]), texts)
            right.append(region.category in [names[i] for i in cosine.argsort(descending=True)[:k]])
    return np.mean(right)


@torch.inference_mode()
def slow_clipself(folder, records):
    """One region at a time: mean over classes of top-1, from embeddings of length 1 of each patch."""
    model, side = load_umg_clip(folder, dtype=torch.float32), open_with_texts(folder)[1]
    spec, names, right = model.vision_tower.spec, ["blue", "green", "red"], {}
    texts = F.normalize(side.texts([f"a {name}" for name in names]), dim=-1)
    for record in records.records:
        square = Image.new("RGB", (56, 56))
        square.paste(Image.open(records.image_path(record)).resize((56, 35), Image.Resampling.BICUBIC), (0, 0))
        normed = PixelNorm(spec.image_mean, spec.image_std)(torch.from_numpy(np.array(square).transpose(2, 0, 1))[None])
        tokens = F.normalize(model.dense_embeddings(normed), dim=-1)[0]
        for region in record.regions:
            if not in_area(region):
                continue
            box = torch.tensor(region.box_xyxy) / 2
            feature_map = tokens.permute(2, 0, 1)[None]
            of_box = roi_align(feature_map, [box[None]], 1, spatial_scale=1 / 14, aligned=True)[0, :, 0, 0]
            inside = np.zeros((112, 112), dtype=bool)
            inside[:70] = region.mask.to_array()
            of_mask = tokens[torch.from_numpy(inside.reshape(4, 28, 4, 28).any(axis=(1, 3)))].mean(dim=0)
            for what, found in (("boxes", of_box), ("masks", of_mask)):
                kind = f"{'stuff' if region.stuff else 'things'}_{what}"
                hit = names[int(F.cosine_similarity(found, texts).argmax())] == region.category
                right.setdefault(kind, {}).setdefault(region.category, []).append(hit)
    del right["stuff_boxes"]  # no figure of the protocol
    return {kind: np.mean([np.mean(hits) for hits in classes.values()]) for kind, classes in right.items()}


def test_a_crowd_of_things_is_a_thing_by_its_category(pair, panoptic, tmp_path):
    crowd = panoptic.records[0].regions[0].model_copy(update={"stuff": True})
    first = panoptic.records[0]
    records = [first.model_copy(update={"regions": [*first.regions, crowd]}), *panoptic.records[1:]]
    write_records(tmp_path / "crowd.jsonl", records)
    asked = {"image_root": panoptic.root, "device": "cpu"}
    own = classify_coco_boxes(pair[1], tmp_path / "crowd.jsonl", CocoBoxConfig("clipself-macc"), **asked)["readouts"][
        "own"
    ]
    assert (own["things_boxes_top1"]["n"], own["stuff_masks_top1"]["n"]) == (7, 5)
    own = classify_coco_boxes(pair[1], tmp_path / "crowd.jsonl", CocoBoxConfig("fgclip-acc"), **asked)["readouts"][
        "own"
    ]
    assert own["boxes_top1"]["n"] == 12  # instances: a crowd is no box of one


def test_each_figure_only_where_it_has_a_meaning(cloc_folder, panoptic):
    """CLOC's texts go with its Prompter: it has no dense features in their space, and no crops."""
    config = CocoBoxConfig("clipself-macc", side=56)
    found = classify_coco_boxes(cloc_folder, panoptic.path, config, device="cpu")["readouts"]
    assert {name: set(figures) for name, figures in found.items()} == {
        "own": {"things_boxes_top1", "things_boxes_top5"}
    }


def test_the_side_is_the_protocols_where_the_tower_takes_it(rice_tower, pair):
    learned, rotary = (describe_tower(t.config) for t in (open_with_texts(pair[1])[0], rice_tower))
    fourteen = replace(rotary, patch_size=14)
    assert protocol_side("clipself-macc", rotary) == 1024 and protocol_side("clipself-macc", fourteen) == 896
    assert protocol_side("clipself-macc", replace(rotary, patch_size=16)) == 1024
    assert protocol_side("clipself-macc", learned) == protocol_side("fgclip-acc", rotary) == 56


def test_what_no_protocol_can_do_is_one_sentence(pair, rice_tower, panoptic, tmp_path):
    rice_tower.save_pretrained(tmp_path)
    config = CocoBoxConfig("fgclip-acc")
    for tower, asked, sentence in (
        (tmp_path, config, "needs a tower with texts"),
        (pair[1], replace(config, readouts=("roi",)), "cannot read by 'roi'"),
        (pair[1], replace(config, readouts=("crops",)), "cannot read by 'crops'"),
        (pair[1], replace(config, protocol="coco"), "clipself-macc or fgclip-acc"),
        (pair[1], replace(config, side=100), "no whole number of patches of 14 px; the nearest size is 98"),
        (pair[1], replace(config, classes=tmp_path / "none.txt"), "cannot be read"),
    ):
        with pytest.raises(UserError, match=sentence):
            classify_coco_boxes(tower, panoptic.path, asked, device="cpu")
    tiny = [r.model_copy(update={"regions": r.regions[1:2]}) for r in panoptic.records]  # of 7 px
    write_records(tmp_path / "tiny.jsonl", tiny)
    with pytest.raises(UserError, match="no region that clipself-macc counts"):
        classify_coco_boxes(
            pair[1], tmp_path / "tiny.jsonl", CocoBoxConfig("clipself-macc"), image_root=panoptic.root, device="cpu"
        )
