"""Masks of records as maps of labels."""

import numpy as np
import pytest

from regiontower.eval.segmentation import SegmentClasses, panoptic_map
from regiontower.eval.segmentation.label_maps import VOID
from regiontower.mllm.boxes import ImageFrame
from regiontower.train_stages.masks import encode_mask
from regiontower.train_stages.records import Mask, Record, Region
from regiontower.vision_towers import UserError


def region(rows: slice, columns: slice, category: str | None = None, **fields) -> Region:
    shape = np.zeros((6, 8), dtype=bool)
    shape[rows, columns] = True
    ys, xs = shape.nonzero()
    box = (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)
    return Region(box_xyxy=box, category=category, mask=Mask(**encode_mask(shape)), **fields)


def record(*regions: Region) -> Record:
    return Record(image="a.png", width=8, height=6, regions=list(regions))


ALL = slice(None)


def test_what_lies_on_top():
    """Things over stuff, the smaller over the larger, the later of equal ones over the earlier."""
    given = record(
        region(slice(0, 2), slice(0, 2), "cup"),
        region(slice(0, 3), slice(0, 4), "table"),
        region(slice(0, 3), slice(2, 6), "table"),  # as large, and later
        region(slice(0, 1), ALL, "sky", stuff=True),
        region(slice(0, 6), slice(7, 8), "sky", stuff=True),
    )
    classes = SegmentClasses.of([given], "category")
    assert classes.names == ["cup", "sky", "table"] and classes.stuff == (False, True, False)
    found = panoptic_map(given, classes)
    letters = np.array(list("cst."))[found.semantic]
    assert ["".join(row) for row in letters] == [
        "ccttttss",
        "cctttt.s",
        "tttttt.s",
        ".......s",
        ".......s",
        ".......s",
    ]
    tables = [place for place, label in enumerate(found.classes) if label == 2]
    assert sorted(int((found.segment == place).sum()) for place in tables) == [2, 12]
    assert found.classes.count(1) == 1 and not any(found.crowd)  # one sky


def test_crowds_are_of_a_class_of_things():
    given = record(region(ALL, slice(0, 4), "man", stuff=True), region(slice(0, 2), slice(0, 2), "man"))
    classes = SegmentClasses.of([given], "category")
    found = panoptic_map(given, classes)
    assert classes.stuff == (False,) and sorted(zip(found.classes, found.crowd, strict=True)) == [(0, False), (0, True)]
    assert (found.semantic[:, :4] == 0).all() and (found.semantic[:, 4:] == VOID).all()


def test_what_nobody_sees_is_no_segment():
    hidden = record(region(slice(0, 2), slice(0, 2), "cup"), region(slice(0, 2), slice(0, 2), "lid"))
    found = panoptic_map(hidden, SegmentClasses.of([hidden], "category"))
    assert found.classes == (1,) and set(np.unique(found.segment)) == {VOID, 0}


def test_a_background_holds_nothing_that_is_unknown():
    given = record(
        region(slice(0, 2), slice(0, 2), "cup"),
        region(slice(0, 2), slice(4, 6)),  # something
        Region(box_xyxy=(0, 3.5, 2, 5), category="cup"),  # a cup of unknown shape
    )
    classes = SegmentClasses.of([given], "category", "background")
    assert classes.names == ["background", "cup"] and classes.stuff == (True, False) and classes.background == 0
    found = panoptic_map(given, classes).semantic
    assert (found[:2, :2] == 1).all() and (found[:2, 4:6] == VOID).all() and (found[3:5, :2] == VOID).all()
    assert (found == 0).sum() == 48 - 4 - 4 - 4
    with pytest.raises(UserError, match="name of things"):
        SegmentClasses.of([given], "category", "cup")


@pytest.mark.parametrize("size", [(8, 6), (5, 9)])
def test_a_view_takes_the_pixel_under_each_cell(size):
    width, height = size
    rng = np.random.default_rng(0)
    given = Record(image="a.png", width=width, height=height, regions=[])
    for _ in range(3):
        shape = rng.random((height, width)) < 0.4
        more = Region(box_xyxy=(0, 0, width, height), category="x", mask=Mask(**encode_mask(shape)))
        given = given.model_copy(update={"regions": [*given.regions, more]})
    whole = panoptic_map(given, SegmentClasses.of([given], "category"))
    frame = ImageFrame.letterbox(size, 12)
    seen = whole.seen(frame, (4, 6))
    assert len(seen.classes) == len(np.unique(seen.segment[seen.segment != VOID]))
    sources = {}
    for row in range(4):
        for column in range(6):
            x = (12 * (column + 0.5) / 6 - frame.offset[0]) / frame.scale[0]
            y = (12 * (row + 0.5) / 4 - frame.offset[1]) / frame.scale[1]
            inside = 0 <= x < width and 0 <= y < height
            source = whole.segment[int(y), int(x)] if inside else VOID
            assert sources.setdefault(seen.segment[row, column], source) == source  # the same segments, by new numbers
    assert len(set(sources.values())) == len(sources) and sources.get(VOID, VOID) == VOID


def test_classes_can_be_left_out():
    given = record(region(slice(0, 2), ALL, "cup"), region(slice(2, 4), ALL, "lid"), region(slice(4, 5), ALL, "pot"))
    whole = panoptic_map(given, SegmentClasses.of([given], "category"))
    found = whole.renumbered([1, VOID, 0])
    assert (found.semantic[:, 0] == [1, 1, VOID, VOID, 0, VOID]).all() and sorted(found.classes) == [0, 1]


def test_what_has_no_classes_is_one_sentence():
    given = record(region(slice(0, 2), ALL, "cup", tags=["red"]))
    assert SegmentClasses.of([given], "tags").names == ["red cup"]
    with pytest.raises(UserError, match="did you mean 'cup'"):
        SegmentClasses.of([given], "category").numbers(["cups"])
    with pytest.raises(UserError, match="category or tags"):
        SegmentClasses.of([given], "cluster")
    with pytest.raises(UserError, match="both a mask and a category"):
        SegmentClasses.of([record(Region(box_xyxy=(0, 0, 1, 1), category="cup"))], "category")
