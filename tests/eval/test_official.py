"""Rows of published benchmarks, from small files of the official form."""

import json
import pickle

import numpy as np
import pytest
from PIL import Image

from regiontower.eval.official import Absent, data_root, official_rows
from regiontower.eval.official.ferret_bench import ferret_bench_rows
from regiontower.eval.official.flickr30k import flickr30k_rows
from regiontower.eval.official.own import own_records
from regiontower.eval.official.refcoco import OFFICIAL_COUNTS, refcoco_rows
from regiontower.train_stages.masks import decode_mask
from regiontower.vision_towers.errors import UserError


def write_refcoco(root, name="refcoco", partition="unc", split="val", sentences=3):
    """One object of a dog beside another dog, with so many sentences about it."""
    folder = root / name
    folder.mkdir(parents=True)
    said = [{"sent": f"the dog number {i}"} for i in range(sentences - 1)] + [{"sent": "the dog number 0"}]
    refs = [{"ref_id": 5, "ann_id": 7, "image_id": 1, "split": split, "sentences": said}]
    (folder / f"refs({partition}).p").write_bytes(pickle.dumps(refs, 2))
    image = {"id": 1, "file_name": "COCO_train2014_000000000001.jpg", "width": 100, "height": 80}
    dogs = [{"id": 7, "image_id": 1, "category_id": 1, "bbox": [10, 10, 40, 30]}]
    dogs.append({"id": 8, "image_id": 1, "category_id": 1, "bbox": [60, 10, 30, 30]})
    document = {"images": [image], "annotations": dogs, "categories": [{"id": 1, "name": "dog"}]}
    (folder / "instances.json").write_text(json.dumps(document))
    (root / "train2014").mkdir(exist_ok=True)
    Image.new("RGB", (100, 80)).save(root / "train2014" / image["file_name"])
    return root


def test_refcoco_has_one_row_a_sentence(tmp_path):
    rows = refcoco_rows(write_refcoco(tmp_path), "refcoco", "val", check_count=False)
    assert [row.phrase for row in rows] == [
        "the dog number 0",
        "the dog number 1",
        "the dog number 0",
    ]  # twice counts twice
    assert rows[0].question == "Where is the dog number 0?"
    assert rows[0].target_xyxy == [10, 10, 50, 40] and rows[0].distractors == 1
    assert rows[0].image == str(tmp_path / "train2014/COCO_train2014_000000000001.jpg")


@pytest.mark.parametrize(("name", "split"), OFFICIAL_COUNTS)
def test_official_counts_are_asserted(tmp_path, name, split):
    partition = "umd" if name == "refcocog" else "unc"
    task = f"regiontower_{name}_{split}"
    write_refcoco(tmp_path / "wrong", name, partition, split)
    with pytest.raises(UserError, match=rf"has 3 sentences, the official one has {OFFICIAL_COUNTS[name, split]}"):
        official_rows(tmp_path / "wrong", task)
    write_refcoco(tmp_path / "right", name, partition, split, sentences=OFFICIAL_COUNTS[name, split])
    assert len(official_rows(tmp_path / "right", task)) == OFFICIAL_COUNTS[name, split]


def test_sentences_are_counted_before_the_limit(tmp_path):
    root = write_refcoco(tmp_path, "refcocog", "umd", sentences=OFFICIAL_COUNTS["refcocog", "val"])
    assert len(official_rows(root, "regiontower_refcocog_val", limit=5)) == 5
    with pytest.raises(UserError, match="has 3 sentences"):
        official_rows(write_refcoco(tmp_path / "b", "refcocog", "umd"), "regiontower_refcocog_val", limit=2)


def test_what_is_missing_is_named_with_its_page(tmp_path):
    with pytest.raises(UserError, match=r"needs --data-root DIR with DIR/refcoco/.*lichengunc/refer"):
        official_rows(None, "regiontower_refcoco_val")
    with pytest.raises(Absent, match=r"no such folder.*lichengunc/refer"):
        official_rows(tmp_path, "regiontower_refcoco_val")
    (tmp_path / "refcoco").mkdir()
    with pytest.raises(UserError, match=r"refs\(unc\)\.p: there is no such file.*lichengunc/refer") as error:
        official_rows(tmp_path, "regiontower_refcoco_val")
    assert not isinstance(error.value, Absent)  # part of it is there: it was meant to be asked
    root = write_refcoco(tmp_path / "b", sentences=OFFICIAL_COUNTS["refcoco", "val"])
    (root / "train2014/COCO_train2014_000000000001.jpg").unlink()
    with pytest.raises(UserError, match=r"no such image .1 are missing.*cocodataset\.org"):
        official_rows(root, "regiontower_refcoco_val")
    for task, page in {
        "flickr30k_test": "flickr30k_entities",
        "reflvis_box": "ml-ferret",
        "ferret_bench_refer_desc": "ml-ferret",
    }.items():
        with pytest.raises(Absent, match=page):
            official_rows(tmp_path, f"regiontower_{task}")


def test_the_data_root_may_come_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.delenv("REGIONTOWER_DATA", raising=False)
    assert data_root(None) is None
    monkeypatch.setenv("REGIONTOWER_DATA", str(tmp_path))
    assert data_root(None) == tmp_path
    with pytest.raises(UserError, match="no such folder for --data-root"):
        data_root(tmp_path / "elsewhere")


@pytest.fixture
def flickr(tmp_path):
    folder = tmp_path / "flickr30k"
    for name in ("Sentences", "Annotations", "images"):
        (folder / name).mkdir(parents=True)
    (folder / "Sentences/7.txt").write_text("[/EN#1/people Two men] near [/EN#2/other a car] .\n")
    boxes = {1: [(10, 20, 60, 70), (80, 15, 95, 60)], 2: [(0, 0, 50, 40)]}
    objects = "".join(
        f"<object><name>{entity}</name><bndbox><xmin>{a}</xmin><ymin>{b}</ymin><xmax>{c}</xmax><ymax>{d}</ymax>"
        "</bndbox></object>"
        for entity, rows in boxes.items()
        for a, b, c, d in rows
    )
    size = "<size><width>100</width><height>80</height></size>"
    (folder / "Annotations/7.xml").write_text(f"<annotation>{size}{objects}</annotation>")
    (folder / "test.txt").write_text("7\n")
    Image.new("RGB", (100, 80)).save(folder / "images/7.jpg")
    return tmp_path


def test_flickr30k_merges_the_boxes_of_a_phrase(flickr):
    men, car = flickr30k_rows(flickr, "test", check_count=False)
    assert men.target_xyxy == [10, 15, 95, 70] and car.target_xyxy == [0, 0, 50, 40]
    assert men.question == 'Where is the "Two men" of "Two men near a car ."?'
    assert men.image == str(flickr / "flickr30k/images/7.jpg")
    with pytest.raises(UserError, match="names 1 images, the official split has 1000"):
        official_rows(flickr, "regiontower_flickr30k_test")


@pytest.fixture
def reflvis(tmp_path):
    (tmp_path / "reflvis").mkdir()
    (tmp_path / "val2017").mkdir()
    Image.new("RGB", (6, 4)).save(tmp_path / "val2017/1.jpg")
    mask = np.zeros((6, 4), dtype=int)  # width x height
    mask[2:4, 1:3] = 1
    item = {
        "id": 1,
        "image_path": "coco/val2017/1.jpg",
        "width": 6,
        "height": 4,
        "name": "bow_(weapon)",
        "synonyms": ["bow_(weapon)"],
        "neg_class": "flower_arrangement",
        "bbox_norm": [0.0, 0.25, 0.5, 1.0],
        "sample_point": [3, 2],
        "free_shape_bbox_raw": [2, 1, 3, 2],
        "free_shape_segment_mask": mask.tolist(),
    }
    lines = [json.dumps(item), json.dumps({**item, "id": 2})]
    (tmp_path / "reflvis/lvis_eval.jsonl").write_text("\n".join(lines))
    return tmp_path


def test_reflvis_points_in_three_ways(reflvis):
    box, point, shape = (official_rows(reflvis, f"regiontower_reflvis_{way}") for way in ("box", "point", "shape"))
    assert box[0].prompt_boxes == [[0, 1, 3, 4]]
    assert point[0].prompt_boxes == [[0.5, 0, 5.5, 4]] and point[0].point_xy == [3, 2]  # 5 px, cut at the edge
    assert shape[0].prompt_boxes == [[2, 1, 4, 3]]
    assert decode_mask((4, 6), shape[0].shape).sum() == 4 and decode_mask((4, 6), shape[0].shape)[1, 2]
    first, second = (row.question for row in box)
    assert first == "Is the object <region> of the image a bow (weapon) or a flower arrangement?"
    assert second == "Is the object <region> of the image a flower arrangement or a bow (weapon)?"
    assert box[0].answers == ["bow (weapon)", "bow", "weapon"] and box[0].choices[1] == "flower arrangement"


def test_ferret_bench_turns_boxes_into_regions(tmp_path):
    folder = tmp_path / "ferret_bench/refer_caption"
    folder.mkdir(parents=True)
    (tmp_path / "val2017").mkdir()
    Image.new("RGB", (200, 100)).save(tmp_path / "val2017/1.jpg")
    (tmp_path / "ferret_bench/rule.json").write_text(
        json.dumps({"refer_desc": {"role": "Assistant", "prompt": "Rate."}})
    )
    common = {"question_id": 3, "image": "1.jpg", "category": "refer_desc"}
    texts = {
        "question": "What is in [0.1, 0.2, 0.5, 0.6] and [0, 0, 1, 1]?",
        "answer": "A sign.",
        "context": "Objects: sign",
    }
    for name, text in texts.items():
        (folder / f"{name}.jsonl").write_text(json.dumps({**common, "text": text}) + "\n")
    with pytest.raises(UserError, match="has 1 questions, the official file has 40"):
        official_rows(tmp_path, "regiontower_ferret_bench_refer_desc")
    (row,) = ferret_bench_rows(tmp_path, "refer_desc", check_count=False)
    assert row.question == "What is in <region> and <region>?"
    assert row.prompt_boxes == [[20, 20, 100, 60], [0, 0, 200, 100]]
    assert row.answers == ["A sign."]
    told = json.loads(row.context)
    assert told["context"] == "Objects: sign" and told["rule"] == "Rate." and told["question"] == texts["question"]


def test_own_records_under_the_root(tmp_path):
    for name in ("here", "there"):
        (tmp_path / name / "images").mkdir(parents=True)
        Image.new("RGB", (10, 10)).save(tmp_path / name / "images/a.png")
    ours = {"image": "images/a.png", "width": 10, "height": 10, "regions": [{"box_xyxy": [0, 0, 5, 5]}]}
    theirs = {"image": "there/images/a.png", "width": 10, "height": 10, "regions": [{"bbox": [0, 0, 5, 5]}]}
    (tmp_path / "here/val.jsonl").write_text(json.dumps(ours))
    (tmp_path / "there/val.jsonl").write_text(json.dumps(theirs))
    here, there = own_records(tmp_path)
    assert (here.name, here.format, here.image_root) == ("here", "records", tmp_path / "here")
    assert (there.name, there.format, there.image_root) == ("there", "xywh_jsonl", tmp_path)
    (tmp_path / "here/val.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match="none of its lines"):
        own_records(tmp_path)
