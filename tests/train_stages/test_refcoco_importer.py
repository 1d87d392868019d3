"""RefCOCO's files as they are published: pickles of Python 2 lists and dicts, COCO's JSON beside them."""

import json
import os
import pickle

import pytest

from regiontower.train_stages.importers.plain_pickle import load_plain_pickle
from regiontower.train_stages.importers.refcoco import read_expressions
from regiontower.train_stages.record_io import read_records
from regiontower.vision_towers.errors import UserError

REFS = [
    {
        "ref_id": 0,
        "ann_id": 11,
        "image_id": 1,
        "category_id": 2,
        "split": "val",
        "file_name": "COCO_train2014_000000000001_0.jpg",
        "sent_ids": [0, 1],
        "sentences": [
            {"sent": "the left cup", "raw": "The left cup", "tokens": ["the", "left", "cup"], "sent_id": 0},
            {"sent": "cup by the wall", "raw": "cup by the wall", "tokens": [], "sent_id": 1},
        ],
    },
    {
        "ref_id": 1,
        "ann_id": 13,
        "image_id": 1,
        "category_id": 3,
        "split": "testA",
        "file_name": "x",
        "sent_ids": [2],
        "sentences": [{"sent": "the dog", "raw": "The dog", "tokens": [], "sent_id": 2}],
    },
]
INSTANCES = {
    "images": [{"id": 1, "file_name": "COCO_train2014_000000000001.jpg", "width": 100, "height": 80}],
    "annotations": [
        {
            "id": 11,
            "image_id": 1,
            "category_id": 2,
            "bbox": [10, 10, 20, 20],
            "segmentation": [[10, 10, 30, 10, 30, 30]],
        },
        {"id": 12, "image_id": 1, "category_id": 2, "bbox": [50, 10, 20, 20], "segmentation": []},
        {"id": 13, "image_id": 1, "category_id": 3, "bbox": [40, 40, 30.5, 20], "iscrowd": 0},
    ],
    "categories": [{"id": 2, "name": "cup"}, {"id": 3, "name": "dog"}],
}


def write(folder, refs=REFS, protocol=2):
    folder.mkdir(exist_ok=True)
    (folder / "refs(unc).p").write_bytes(pickle.dumps(refs, protocol))
    (folder / "instances.json").write_text(json.dumps(INSTANCES))
    return folder / "refs(unc).p"


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_one_entry_for_each_sentence(tmp_path, protocol):
    found = read_expressions(write(tmp_path, protocol=protocol))
    assert [(item.sentence, item.split, item.category, item.others) for item in found] == [
        ("the left cup", "val", "cup", 1),
        ("cup by the wall", "val", "cup", 1),
        ("the dog", "testA", "dog", 0),
    ]
    assert found[0].box_xyxy == (10, 10, 30, 30)
    assert found[2].box_xyxy == (40, 40, 70.5, 60)
    assert (found[0].image, found[0].width, found[0].height) == ("COCO_train2014_000000000001.jpg", 100, 80)
    assert [item.sentence for item in read_expressions(tmp_path / "refs(unc).p", "testA")] == ["the dog"]


def test_a_pickle_of_python_2_is_read(tmp_path):
    # What Python 2 wrote for [{"sent": "caf\xe9"}]: byte strings, protocol 0.
    (tmp_path / "old.p").write_bytes(b"(lp0\n(dp1\nS'sent'\np2\nS'caf\\xe9'\np3\nsa.")
    assert load_plain_pickle(tmp_path / "old.p") == [{"sent": "café"}]


class Malicious:
    def __init__(self, call):
        self.call = call

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("where", ["alone", "inside a list", "as a key's value"])
def test_a_malicious_pickle_is_refused_and_not_run(tmp_path, where):
    trace = tmp_path / "it ran"
    bad = Malicious((os.mkdir, (str(trace),)))
    value = {"alone": bad, "inside a list": [1, [bad]], "as a key's value": [{"sentences": bad}]}[where]
    path = write(tmp_path / "refcoco", value)
    pickle.loads(path.read_bytes())  # this is what it would do
    assert trace.is_dir()
    trace.rmdir()
    for read in (load_plain_pickle, read_expressions):
        with pytest.raises(UserError, match="was not run") as error:
            read(path)
        assert "\n" not in str(error.value) and "mkdir" in str(error.value)
    assert not trace.exists()


@pytest.mark.parametrize(
    "payload",
    [
        b"cbuiltins\neval\n(S'1'\ntR.",  # GLOBAL
        b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93\x8c\x011\x85R.",  # STACK_GLOBAL
        b"(S'1'\nibuiltins\neval\n.",  # INST
        b"\x80\x02\x82\x01.",  # EXT1
        b"Pthe id of something elsewhere\n.",  # PERSID
    ],
)
def test_every_way_to_name_code_is_refused(tmp_path, payload):
    (tmp_path / "x.p").write_bytes(payload)
    with pytest.raises(UserError, match="is not a pickle of plain"):
        load_plain_pickle(tmp_path / "x.p")


def test_harmless_classes_are_refused_too(tmp_path):
    import collections

    (tmp_path / "x.p").write_bytes(pickle.dumps(collections.OrderedDict(a=1)))
    with pytest.raises(UserError, match="OrderedDict"):
        load_plain_pickle(tmp_path / "x.p")


def test_missing_and_foreign_files_get_one_sentence(tmp_path):
    with pytest.raises(UserError, match="lichengunc/refer"):
        read_expressions(tmp_path / "refs(unc).p")
    path = write(tmp_path)
    path.write_bytes(b"not a pickle")
    with pytest.raises(UserError, match="not a pickle"):
        read_expressions(path)
    path.write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(UserError, match="not a list of refs"):
        read_expressions(path)
    write(tmp_path, [{**REFS[0], "ann_id": 99}])
    with pytest.raises(UserError, match=r"ref number 0 cannot be used .99 is missing"):
        read_expressions(path)
    (tmp_path / "instances.json").unlink()
    with pytest.raises(UserError, match=r"instances\.json.*lichengunc/refer"):
        read_expressions(path)


def test_as_region_records(tmp_path):
    records = read_records(write(tmp_path), format="refcoco")
    (record,) = records.records
    assert not records.bad and record.split == "val"
    cup, other, dog = record.regions
    assert cup.texts == ["the left cup", "cup by the wall"] and cup.mask is not None
    assert other.texts == [] and other.category == "cup"
    assert dog.texts == ["the dog"] and dog.box_xyxy == (40, 40, 70.5, 60)
    only = read_records(tmp_path / "refs(unc).p", format="refcoco", split="testA").records[0]
    assert [region.texts for region in only.regions] == [[], [], ["the dog"]]
