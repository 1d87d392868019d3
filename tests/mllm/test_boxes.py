"""Boxes and points: validation, geometry, immutability."""

import pickle

import numpy as np
import pytest

from regiontower.mllm.boxes import Boxes, Points
from regiontower.vision_towers.errors import UserError


def test_rows_become_float64_and_read_only():
    boxes = Boxes([[1, 2, 3, 4]])
    assert boxes.xyxy.dtype == np.float64 and boxes.xyxy.shape == (1, 4)
    with pytest.raises(ValueError):
        boxes.xyxy[0, 0] = 7
    with pytest.raises(AttributeError):
        boxes.xyxy = np.zeros((1, 4))  # type: ignore[misc]


def test_later_changes_of_the_source_do_not_show():
    source = np.array([[1.0, 2.0, 3.0, 4.0]])
    boxes = Boxes(source)
    source[:] = 9
    assert boxes[0] == (1, 2, 3, 4)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_a_number_that_is_not_finite_is_named_by_row(number):
    with pytest.raises(UserError, match=r"box 1 .*finite"):
        Boxes([[0, 0, 1, 1], [0, 0, number, 1]])


@pytest.mark.parametrize("row", [[5, 0, 4, 1], [0, 5, 1, 4]])
def test_an_inverted_box_is_named_by_row(row):
    with pytest.raises(UserError, match=r"box 2 .*inverted"):
        Boxes([[0, 0, 1, 1], [0, 0, 0, 0], row])


@pytest.mark.parametrize("rows", [[1, 2, 3, 4], [[1, 2, 3]], [[[1, 2, 3, 4]]], [["a", "b", "c", "d"]], [[1, 2], [3]]])
def test_other_shapes_are_user_errors(rows):
    with pytest.raises(UserError, match=r"\[x1, y1, x2, y2\]"):
        Boxes(rows)


def test_xywh():
    assert Boxes.from_xywh([[10, 20, 5, 0]]) == Boxes([[10, 20, 15, 20]])
    with pytest.raises(UserError, match=r"box 0 .*negative"):
        Boxes.from_xywh([[10, 20, -1, 5]])


def test_index_and_iteration():
    boxes = Boxes([[0, 0, 1, 1], [0, 0, 2, 2], [0, 0, 3, 3]])
    assert boxes[1] == (0, 0, 2, 2) and boxes[-1] == (0, 0, 3, 3)
    assert boxes[1:] == Boxes([[0, 0, 2, 2], [0, 0, 3, 3]])
    assert boxes[[2, 0]] == Boxes([[0, 0, 3, 3], [0, 0, 1, 1]])
    assert boxes[np.array([False, True, False])] == Boxes([[0, 0, 2, 2]])
    assert boxes[[]] == Boxes.empty() and boxes[np.array([], dtype=int)] == Boxes.empty()
    assert list(boxes) == [(0, 0, 1, 1), (0, 0, 2, 2), (0, 0, 3, 3)]
    with pytest.raises(IndexError):
        boxes[3]


def test_empty():
    boxes = Boxes.empty()
    assert len(boxes) == 0 and boxes.xyxy.shape == (0, 4) and Boxes([]) == boxes
    assert boxes.iou(Boxes([[0, 0, 1, 1]])).shape == (0, 1)
    assert boxes.clip(5, 5) == boxes and tuple(boxes.tensor().shape) == (0, 4)


def test_clip_keeps_the_rows():
    clipped = Boxes([[-5, -5, 5, 5], [200, 200, 300, 300]]).clip(100, 50)
    assert clipped == Boxes([[0, 0, 5, 5], [100, 50, 100, 50]])


def test_iou_by_hand():
    iou = Boxes([[0, 0, 10, 10], [20, 20, 30, 30]]).iou(Boxes([[0, 0, 10, 10], [5, 0, 15, 10], [10, 0, 20, 10]]))
    np.testing.assert_allclose(iou, [[1, 50 / 150, 0], [0, 0, 0]])


def test_iou_without_area_is_zero_and_silent():
    line, point = [3, 3, 3, 9], [4, 4, 4, 4]
    with np.errstate(all="raise"):
        iou = Boxes([line, point]).iou(Boxes([line, point, [0, 0, 10, 10]]))
    assert (iou == 0).all()


def test_tensor_is_float32():
    import torch

    tensor = Boxes([[1, 2, 3, 4.5]]).tensor()
    assert tensor.dtype == torch.float32 and tensor.tolist() == [[1, 2, 3, 4.5]]


def test_boxes_and_points_travel_between_processes():
    boxes, points = Boxes([[1, 2, 3, 4]]), Points([[1, 2]])
    assert pickle.loads(pickle.dumps(boxes)) == boxes
    assert pickle.loads(pickle.dumps(points)) == points
    assert not pickle.loads(pickle.dumps(boxes)).xyxy.flags.writeable


def test_points():
    points = Points([[10, 20], [0, 0]])
    assert list(points) == [(10, 20), (0, 0)] and len(points) == 2
    assert points.to_boxes() == Boxes([[7.5, 17.5, 12.5, 22.5], [-2.5, -2.5, 2.5, 2.5]])
    assert points.to_boxes(side=1)[0] == (9.5, 19.5, 10.5, 20.5)
    assert len(Points([])) == 0 and len(Points([]).to_boxes()) == 0
    with pytest.raises(UserError, match="point 1"):
        Points([[0, 0], [float("nan"), 1]])
    with pytest.raises(UserError, match=r"\[x, y\]"):
        Points([[0, 0, 1, 1]])
    with pytest.raises(UserError, match="positive"):
        points.to_boxes(side=0)
