"""COCO's panoptic files, made here as COCO makes them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from regiontower.train_stages.importers import get_importer, import_coco_panoptic
from regiontower.train_stages.importers.coco_panoptic import segment_ids
from regiontower.train_stages.record_io import read_records
from regiontower.vision_towers.errors import UserError

CATEGORIES = [
    {"id": 1, "name": "person", "isthing": 1, "supercategory": "person"},
    {"id": 17, "name": "cat", "isthing": 1, "supercategory": "animal"},
    {"id": 187, "name": "sky-other-merged", "isthing": 0, "supercategory": "sky"},
]
CAT, CROWD, SKY = 7, 256 + 9, 3 * 256**2 + 2 * 256 + 1  # ids in one, two and three bytes


def ids() -> np.ndarray:
    found = np.zeros((30, 40), dtype=np.int64)
    found[:10] = SKY
    found[5:20, 4:14] = CAT
    found[20:, 30:] = CROWD
    found[0, 39] = CAT  # a segment need not hang together
    return found


def write(folder: Path, segments: list[Any], png: np.ndarray | None = None, **fields: Any) -> Path:
    """`folder/panoptic.json` and the PNG of its one annotation."""
    root = folder / "panoptic"
    root.mkdir(parents=True, exist_ok=True)
    found = ids() if png is None else png
    colours = np.stack([found % 256, found // 256 % 256, found // 256**2], axis=-1).astype(np.uint8)
    Image.fromarray(colours).save(root / "a.png")
    images = [{"id": 5, "file_name": "a.jpg", "width": 40, "height": 30}, {"id": 6, "file_name": "b.jpg"}]
    images[1] |= {"width": 3, "height": 2}
    annotation = {"image_id": 5, "file_name": "a.png", "segments_info": segments}
    document = {"images": images, "annotations": [annotation], "categories": CATEGORIES, "info": {}} | fields
    path = folder / "panoptic.json"
    path.write_text(json.dumps(document))
    return path


def segment(identity: int, category: int, iscrowd: int = 0) -> dict[str, Any]:
    # COCO's own area and bbox are not read.
    return {"id": identity, "category_id": category, "iscrowd": iscrowd, "area": 1, "bbox": [0, 0, 1, 1]}


ALL = [segment(CAT, 17), segment(CROWD, 1, iscrowd=1), segment(SKY, 187)]


def test_segments_become_regions(tmp_path):
    assert get_importer("coco_panoptic") is import_coco_panoptic
    first, second = read_records(write(tmp_path, ALL), "coco_panoptic").records
    assert (first.image, first.width, first.height) == ("a.jpg", 40, 30) and second.regions == []
    cat, crowd, sky = first.regions
    assert [(r.category, r.stuff) for r in first.regions] == [
        ("cat", False), ("person", True), ("sky-other-merged", True),
    ]  # fmt: skip
    assert [r.box_xyxy for r in first.regions] == [(4, 0, 40, 20), (30, 20, 40, 30), (0, 0, 40, 10)]
    for region, identity in ((cat, CAT), (crowd, CROWD), (sky, SKY)):
        assert np.array_equal(region.mask.to_array(), ids() == identity)
        assert region.texts == []


def test_the_pngs_may_lie_elsewhere(tmp_path):
    path = write(tmp_path, ALL)
    (tmp_path / "panoptic").rename(tmp_path / "segments")
    with pytest.raises(UserError, match="should hold the PNGs of panoptic"):
        read_records(path, "coco_panoptic")
    found = read_records(path, "coco_panoptic", segments_root=tmp_path / "segments")
    assert len(found.records[0].regions) == 3


def test_ids_are_read_from_three_bytes(tmp_path):
    write(tmp_path, ALL)
    assert np.array_equal(segment_ids(tmp_path / "panoptic" / "a.png"), ids())


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        ([*ALL, segment(99, 1)], "segment 99: has no pixel"),
        (ALL[:2], f"has a segment {SKY} that 'segments_info' does not name"),
        ([segment(CAT, 3), *ALL[1:]], "its category 3 is not among"),
        ([*ALL, segment(0, 1)], "the id 0 is that of void"),
        ([*ALL, ALL[0]], "two of its segments have the same id"),
        ([*ALL, 4], "segment 4: is not an object"),
        ([{"id": CAT}], "'category_id' is missing"),
        (None, "'segments_info' is None"),
    ],
)
def test_faults_of_segments_are_named(tmp_path, segments, message):
    found = read_records(write(tmp_path, segments), "coco_panoptic")
    assert [record.image for record in found.records] == ["b.jpg"]
    assert found.bad[0].line == "image 5 (a.jpg)" and message in found.bad[0].reason


def test_faults_of_pngs_are_named(tmp_path):
    path = write(tmp_path, ALL, ids()[:-1])
    assert "40 x 29 px, and the image 40 x 30" in read_records(path, "coco_panoptic").bad[0].reason
    png = tmp_path / "panoptic" / "a.png"
    Image.fromarray(ids().astype(np.uint8)).save(png)
    assert "mode L" in read_records(path, "coco_panoptic").bad[0].reason
    png.write_bytes(b"no picture")
    assert "a.png: cannot be read" in read_records(path, "coco_panoptic").bad[0].reason
    png.unlink()
    assert "a.png: cannot be read" in read_records(path, "coco_panoptic").bad[0].reason


def test_annotations_belong_to_one_image_each(tmp_path):
    one = {"image_id": 5, "file_name": "a.png", "segments_info": ALL}
    path = write(tmp_path, ALL, annotations=[one, one, {"image_id": 8}, {}])
    found = read_records(path, "coco_panoptic")
    assert len(found.records) == 2 and len(found.records[0].regions) == 3
    reasons = " ".join(bad.reason for bad in found.bad)
    assert "another annotation already" in reasons and "no 'image_id'" in reasons and "not among the images" in reasons


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"images": None}, "is not COCO's layout"), ({"categories": [{"id": 1, "name": "cat"}]}, "'isthing' is missing")],
)
def test_another_layout_is_refused(tmp_path, fields, message):
    with pytest.raises(UserError, match=message):
        read_records(write(tmp_path, ALL, **fields), "coco_panoptic")
