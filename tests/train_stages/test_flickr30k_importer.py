"""Flickr30k Entities as published: marked captions, boxes in XML."""

import pytest

from regiontower.train_stages.importers.flickr30k import read_image_ids, read_phrases
from regiontower.train_stages.record_io import read_records
from regiontower.vision_towers.errors import UserError

SENTENCES = (
    "[/EN#1/people Two men] stand by [/EN#2/other/vehicles an old red car] in [/EN#3/scene the street] .\n"
    "[/EN#1/people Men] look at [/EN#0/notvisual it] .\n"
    "It is noon .\n"
    "It is noon .\n"
)
XML = """<annotation><filename>7.jpg</filename><size><width>500</width><height>375</height><depth>3</depth></size>
<object><name>1</name><bndbox><xmin>10</xmin><ymin>20</ymin><xmax>60</xmax><ymax>200</ymax></bndbox></object>
<object><name>1</name><bndbox><xmin>80</xmin><ymin>15</ymin><xmax>120</xmax><ymax>210</ymax></bndbox></object>
<object><name>2</name><bndbox><xmin>200</xmin><ymin>100</ymin><xmax>400</xmax><ymax>300</ymax></bndbox></object>
<object><name>3</name><nobndbox>1</nobndbox><scene>1</scene></object></annotation>"""


@pytest.fixture
def folder(tmp_path):
    for name in ("Sentences", "Annotations"):
        (tmp_path / name).mkdir()
    (tmp_path / "Sentences/7.txt").write_text(SENTENCES)
    (tmp_path / "Annotations/7.xml").write_text(XML)
    (tmp_path / "test.txt").write_text("7\n")
    return tmp_path


def test_phrases_with_boxes(folder):
    found = read_phrases(folder, "7")
    assert [(item.phrase, item.entity, item.kinds, len(item.boxes)) for item in found] == [
        ("Two men", "1", ("people",), 2),
        ("an old red car", "2", ("other", "vehicles"), 1),
        ("Men", "1", ("people",), 2),
    ]
    assert found[0].sentence == "Two men stand by an old red car in the street ."
    assert found[2].sentence == "Men look at it ."
    assert found[0].merged_box == (10, 15, 120, 210)  # the smallest box around both
    assert (found[0].width, found[0].height) == (500, 375)


def test_as_region_records(folder):
    (record,) = read_records(folder / "test.txt", format="flickr30k").records
    assert record.image == "7.jpg" and record.split == "test"
    men, car = record.regions
    assert men.texts == ["Two men", "Men"] and men.box_xyxy == (10, 15, 120, 210) and men.stuff
    assert car.texts == ["an old red car"] and not car.stuff
    assert record.captions[1:] == ["Men look at it .", "It is noon .", "It is noon ."]  # all that retrieval asks


def test_what_is_missing_is_named_with_its_page(folder):
    with pytest.raises(UserError, match="flickr30k_entities"):
        read_image_ids(folder / "val.txt")
    (folder / "Annotations/7.xml").write_text("<annotation><size>")
    with pytest.raises(UserError, match="boxes of this image cannot be read"):
        read_phrases(folder, "7")
    (folder / "Sentences/7.txt").unlink()
    (folder / "Annotations/7.xml").write_text(XML)
    with pytest.raises(UserError, match="captions of image 7"):
        read_phrases(folder, "7")
