import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from regiontower.train_stages.importers import (
    get_importer,
    import_coco,
    import_records,
    importer_names,
    register_importer,
)
from regiontower.train_stages.phrases import unique_texts
from regiontower.train_stages.record_io import data_hash, read_records, write_records
from regiontower.vision_towers.errors import UserError


def write_lines(path: Path, items: list[Any]) -> Path:
    path.write_text("\n".join(json.dumps(item) for item in items))
    return path


def save_image(path: Path, width: int = 40, height: int = 30) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), "gray").save(path)
    return path


# --- registry


def test_importers_are_found_by_exact_name_only():
    assert importer_names() == ("records", "xywh_jsonl", "coco", "coco_panoptic", "llava", "refcoco", "flickr30k")
    assert get_importer("coco") is import_coco
    with pytest.raises(ValueError, match="registered already"):
        register_importer("records", import_records)
    with pytest.raises(UserError, match="did you mean 'coco'"):
        get_importer("coc")
    with pytest.raises(UserError, match="choose one of records, xywh_jsonl"):
        get_importer("")


# --- xywh_jsonl


def xywh_item(**fields) -> dict[str, Any]:
    return {"image": "a.png", "width": 40, "height": 30, "image_id": 7, "license": "CC", **fields}


def test_xywh_fields_arrive_where_they_belong(tmp_path):
    region = {
        "id": 3,
        "bbox": [4, 5, 10, 20],
        "category": "cup",
        "text": " TEA ",
        "expressions": [{"kind": "color", "text": "the red cup"}, {"kind": "size", "text": "the red cup"}],
        "segmentation": [[4, 5, 14, 5, 14, 25, 4, 25]],
        "captions": ["a cup of tea"],
        "tags": ["red"],
    }
    crowd = {"bbox": [0, 0, 9, 9], "iscrowd": 1, "segmentation": {"size": [30, 40], "counts": [0, 5, 1195]}}
    bare = {"bbox": [1.5, 2, 3, 4], "segmentation": None, "category": None, "text": ""}
    item = xywh_item(captions=["a table"], tags=["table"], split="val", regions=[region, crowd, bare])
    record = read_records(write_lines(tmp_path / "a.jsonl", [item]), format="xywh_jsonl").records[0]

    assert (record.image, record.width, record.height, record.split) == ("a.png", 40, 30, "val")
    assert (record.captions, record.tags) == (["a table"], ["table"])
    cup, many, plain = record.regions
    assert cup.box_xyxy == (4, 5, 14, 25)
    assert (cup.category, cup.ocr, cup.stuff) == ("cup", "TEA", False)
    assert (cup.texts, cup.captions, cup.tags) == (["the red cup"], ["a cup of tea"], ["red"])
    assert cup.mask is not None
    assert cup.mask.to_array()[5:25, 4:14].all()
    assert cup.mask.to_array().sum() == 200
    assert many.stuff
    assert many.mask is not None
    assert many.mask.to_array().T.ravel()[:6].tolist() == [True] * 5 + [False]
    assert plain.model_dump(exclude_defaults=True) == {"box_xyxy": (1.5, 2, 4.5, 6)}


def test_xywh_box_out_by_rounding_is_clipped_and_further_out_is_bad(tmp_path):
    items = [xywh_item(regions=[{"bbox": [30.1, 0, 10.0, 30.1]}]), xywh_item(regions=[{"bbox": [30, 0, 12, 30]}])]
    found = read_records(write_lines(tmp_path / "a.jsonl", items), format="xywh_jsonl")
    assert found.records[0].regions[0].box_xyxy == (30.1, 0, 40, 30)
    assert [bad.line for bad in found.bad] == ["line 2"]
    assert "outside the image" in found.bad[0].reason


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({"image": "a.png", "height": 30}, "'width' is missing"),
        (xywh_item(width="40"), "'width' is '40', of the wrong type"),
        (xywh_item(image=None), "'image' is None"),
        (xywh_item(captions="one"), "'captions' is 'one'"),
        (xywh_item(captions=[1]), "not a string"),
        (xywh_item(regions=[3]), "regions[0] is not an object"),
        (xywh_item(regions=[{"bbox": [1, 2, 3, 4]}, {}]), "regions[1]: 'bbox' is missing"),
        (xywh_item(regions=[{"bbox": [1, 2, 3]}]), "not [x, y, width, height]"),
        (xywh_item(regions=[{"bbox": [1, 2, float("nan"), 4]}]), "not finite"),
        (xywh_item(regions=[{"bbox": [1, 2, 0, 4]}]), "no area"),
        (xywh_item(regions=[{"bbox": [1, 2, -3, 4]}]), "inverted"),
        (xywh_item(regions=[{"bbox": [1, 2, 3, 4], "expressions": ["red"]}]), "'expressions'"),
        (xywh_item(regions=[{"bbox": [1, 2, 3, 4], "segmentation": [[1, 2, 3, 4, 5, 6, 7]]}]), "odd number"),
        (xywh_item(regions=[{"bbox": [1, 2, 3, 4], "segmentation": {"size": [9, 9], "counts": "Q"}}]), "mask counts"),
        (xywh_item(regions=[{"bbox": [1, 2, 3, 4], "segmentation": {"size": [4, 3], "counts": [0, 12]}}]), "its size"),
        (xywh_item(regions=[{"bbox": [1, 2, 3, 4], "segmentation": "polygon"}]), "'segmentation'"),
    ],
)
def test_xywh_faults_are_named(tmp_path, item, message):
    found = read_records(write_lines(tmp_path / "a.jsonl", [xywh_item(), item]), format="xywh_jsonl")
    assert [bad.line for bad in found.bad] == ["line 2"]
    assert message in found.bad[0].reason


PARTS = {"natural/train": 178, "natural/val": 55, "ocr/train": 130, "ocr/val": 40, "human_re/val": 9}


@pytest.mark.parametrize("part", PARTS)
def test_every_real_record_imports_and_survives_a_round_trip(shared_data, tmp_path, part):
    found = read_records(shared_data / f"{part}.jsonl", format="xywh_jsonl", image_root=shared_data, check_images=True)
    assert found.summary() == f"{PARTS[part]} records, 0 bad"

    lines = [json.loads(line) for line in (shared_data / f"{part}.jsonl").read_text().splitlines()]
    for record, line in zip(found.records, lines, strict=True):
        assert len(record.regions) == len(line["regions"])
        for region, source in zip(record.regions, line["regions"], strict=True):
            x, y, width, height = source["bbox"]
            assert np.abs(np.subtract(region.box_xyxy, (x, y, x + width, y + height))).max() < 0.2
            assert set(region.texts) == {expression["text"] for expression in source["expressions"]}
            assert region.ocr == source.get("text")
            assert (region.mask is not None) == bool(source.get("segmentation"))

    write_records(tmp_path / "records.jsonl", found.records)
    again = read_records(tmp_path / "records.jsonl", image_root=shared_data)
    assert again.records == found.records


def test_real_boxes_that_stick_out_by_rounding_are_clipped(shared_data):
    path = shared_data / "natural" / "train.jsonl"
    found = read_records(path, format="xywh_jsonl", image_root=shared_data)
    sticking_out = 0
    for record, line in zip(found.records, path.read_text().splitlines(), strict=True):
        for region, source in zip(record.regions, json.loads(line)["regions"], strict=True):
            x, y, width, height = source["bbox"]
            if x + width > record.width or y + height > record.height:
                sticking_out += 1
                assert region.box_xyxy[2] == record.width or region.box_xyxy[3] == record.height
    assert sticking_out


def test_real_expressions_of_natural_photos_single_out_one_region(shared_data):
    found = read_records(shared_data / "natural" / "val.jsonl", format="xywh_jsonl", image_root=shared_data)
    assert sum(len(unique_texts(record)) for record in found.records) == 381


def test_the_error_for_missing_images_names_image_root(shared_data):
    with pytest.raises(UserError, match="image_root must be the folder that image paths start from"):
        read_records(shared_data / "natural" / "val.jsonl", format="xywh_jsonl", check_images=True)


# --- coco


@pytest.fixture
def coco_files(tmp_path) -> tuple[Path, Path]:
    images = [
        {"id": 1, "file_name": "images/1.png", "width": 40, "height": 30},
        {"id": 2, "file_name": "images/2.png", "width": 40, "height": 30},
    ]
    instances = {
        "images": images,
        "categories": [{"id": 18, "name": "dog"}, {"id": 1, "name": "person"}],
        "annotations": [
            {
                "id": 10,
                "image_id": 1,
                "category_id": 18,
                "bbox": [4, 5, 10, 20.5],
                "iscrowd": 0,
                "segmentation": [[4, 5, 14, 5, 14, 25, 4, 25]],
            },
            {
                "id": 11,
                "image_id": 1,
                "category_id": 1,
                "bbox": [0, 0, 40, 30],
                "iscrowd": 1,
                "segmentation": {"size": [30, 40], "counts": [600, 600]},
            },
        ],
    }
    captions = {
        "images": images,
        "annotations": [
            {"id": 5, "image_id": 1, "caption": "A dog before a crowd. "},
            {"id": 6, "image_id": 1, "caption": "a dog"},
            {"id": 9, "image_id": 1, "caption": "a dog\n"},
            {"id": 7, "image_id": 2, "caption": "nothing much"},
            {"id": 8, "image_id": 99, "caption": "an image of another file"},
        ],
    }
    save_image(tmp_path / "images" / "1.png")
    save_image(tmp_path / "images" / "2.png")
    (tmp_path / "instances.json").write_text(json.dumps(instances))
    (tmp_path / "captions.json").write_text(json.dumps(captions))
    return tmp_path / "instances.json", tmp_path / "captions.json"


def change(path: Path, edit) -> Path:
    document = json.loads(path.read_text())
    edit(document)
    path.write_text(json.dumps(document))
    return path


def test_coco_instances_and_captions_together(coco_files):
    instances, captions = coco_files
    found = read_records(instances, format="coco", captions_path=captions, check_images=True)
    assert found.summary() == "2 records, 0 bad"
    first, second = found.records
    dog, crowd = first.regions
    assert (dog.category, dog.box_xyxy, dog.stuff, dog.texts) == ("dog", (4, 5, 14, 25.5), False, [])
    assert dog.mask is not None
    assert dog.mask.to_array().sum() == 200
    assert (crowd.category, crowd.stuff) == ("person", True)
    assert crowd.mask is not None
    assert crowd.mask.to_array()[:, 20:].all()
    assert crowd.mask.to_array().sum() == 600
    assert first.captions == ["A dog before a crowd.", "a dog", "a dog"]  # as many as people wrote
    assert (second.captions, second.regions) == (["nothing much"], [])
    assert data_hash(found) != data_hash(read_records(instances, format="coco"))


def test_coco_instances_alone_and_captions_alone(coco_files):
    instances, captions = coco_files
    assert [record.captions for record in read_records(instances, format="coco").records] == [[], []]
    change(captions, lambda document: document["annotations"].pop())
    found = read_records(captions, format="coco")
    assert [(len(record.captions), record.regions) for record in found.records] == [(3, []), (1, [])]


def test_lvis_names_its_images_by_their_address(coco_files, tmp_path):
    """LVIS v1 has no file_name; its images are COCO's, of both splits."""
    names = ["train2017/000000397133.jpg", "val2017/000000000139.jpg"]

    def edit(document):
        for image, name in zip(document["images"], names, strict=True):
            del image["file_name"]
            image["coco_url"] = f"http://images.cocodataset.org/{name}"

    path = change(coco_files[0], edit)
    for name in names:
        save_image(tmp_path / name)
    found = read_records(path, format="coco", check_images=True)
    assert [record.image for record in found.records] == names and not found.bad
    assert [region.category for region in found.records[0].regions] == ["dog", "person"]

    change(path, lambda document: document["images"][1].pop("coco_url"))
    (bad,) = read_records(path, format="coco").bad
    assert bad.line == "image 2 (None)" and "'file_name' is missing" in bad.reason
    change(path, lambda document: document["images"][1].update(coco_url=7))
    (bad,) = read_records(path, format="coco").bad
    assert bad.line == "image 2 (7)" and "'coco_url' is 7" in bad.reason


@pytest.mark.parametrize(
    ("edit", "label", "message"),
    [
        (lambda d: d["annotations"][0].update(bbox=[4, 5, 0, 9]), "image 1 (images/1.png)", "annotation 10: box_xyxy"),
        (lambda d: d["annotations"][0].update(category_id=77), "image 1 (images/1.png)", "annotation 10: its category"),
        (lambda d: d["annotations"][0].pop("bbox"), "image 1 (images/1.png)", "neither a 'bbox' nor a 'caption'"),
        (lambda d: d["annotations"][0].update(image_id=3), "annotation 10", "not among the images"),
        (lambda d: d["annotations"].append(3), "annotation number 2", "not an object"),
        (lambda d: d["images"][1].update(id=1), "image 1 (images/1.png)", "occurs twice"),
        (lambda d: d["images"][1].pop("id"), "image number 1", "'id' is missing"),
        (lambda d: d["images"][1].pop("width"), "image 2 (images/2.png)", "'width' is missing"),
        (lambda d: d["images"].append("x"), "image number 2", "not an object"),
    ],
)
def test_coco_faults_are_named(coco_files, edit, label, message):
    found = read_records(change(coco_files[0], edit), format="coco")
    assert len(found.bad) == 1
    assert found.bad[0].line in (label, label.replace("1.png", "2.png"))
    assert message in found.bad[0].reason


@pytest.mark.parametrize(
    "text", ["[1, 2]", '{"images": []}', '{"images": [], "annotations": [], "categories": 3}', "{", "\xff"]
)
def test_a_file_that_is_not_coco_is_refused(tmp_path, text):
    (tmp_path / "a.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"a\.json: is not"):
        read_records(tmp_path / "a.json", format="coco")
