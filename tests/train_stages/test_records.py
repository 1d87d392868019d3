import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from regiontower.train_stages.masks import compress_counts, decode_mask, encode_mask, polygons_to_mask
from regiontower.train_stages.phrases import (
    normalise_phrase,
    phrase_referents,
    shared_texts,
    unique_phrases,
    unique_texts,
)
from regiontower.train_stages.records import Record, Region, explain


def make_record(**fields) -> Record:
    return Record.model_validate({"image": "a.png", "width": 100, "height": 80, **fields})


def why_not(**fields) -> str:
    with pytest.raises(ValidationError) as caught:
        make_record(**fields)
    return explain(caught.value)


def box_fault(*box: object) -> str:
    return why_not(regions=[{"box_xyxy": [0, 0, 1, 1]}, {"box_xyxy": list(box)}])


# --- one record


@pytest.mark.parametrize(
    ("box", "message"),
    [
        ([0, 0, math.nan, 5], "finite"),
        ([0, 0, math.inf, 5], "finite"),
        ([5, 5, 4, 6], "inverted"),
        ([5, 6, 6, 5], "inverted"),
        ([5, 5, 5, 6], "no area"),
        ([5, 5, 6, 5], "no area"),
        ([50, 0, 101.5, 5], "outside the image of 100 x 80"),
        ([0, -1.5, 10, 5], "outside the image"),
        ([100.2, 0, 100.8, 5], "nothing of the box"),
        ([0, 0, 1], "4 numbers"),
        ([0, 0, 1, "5"], "not a number"),
        ([0, 0, 1, True], "not a number"),
        ([0, 0, 1, None], "not a number"),
        ([0, 0, 10**400, 5], "not a number"),
    ],
)
def test_a_bad_box_is_refused_and_named(box, message):
    fault = box_fault(*box)
    assert message in fault
    assert "regions[1].box_xyxy" in fault


def test_a_box_over_the_edge_by_rounding_is_clipped_and_others_are_kept_exactly():
    record = make_record(regions=[{"box_xyxy": [-1, -0.3, 100.4, 81]}, {"box_xyxy": [0.1, 0.2, 99.9, 79.7]}])
    assert record.regions[0].box_xyxy == (0, 0, 100, 80)
    assert record.regions[1].box_xyxy == (0.1, 0.2, 99.9, 79.7)


def test_points_must_lie_in_the_image():
    assert make_record(points=[{"xy": [100.5, 3]}]).points[0].xy == (100, 3)
    assert "points[0].xy" in why_not(points=[{"xy": [3, 82]}])


@pytest.mark.parametrize("side", ["width", "height"])
@pytest.mark.parametrize("value", [0, -3, 2.5, "64", True, None, 10**400])
def test_sides_are_positive_whole_numbers(side, value):
    assert side in why_not(**{side: value})


def test_numpy_numbers_are_numbers():
    record = Record(
        image="a", width=np.int64(9), height=9.0, regions=[Region(box_xyxy=np.array([0, 1, 2, 3], np.float32))]
    )
    assert (record.width, record.height) == (9, 9)
    assert record.regions[0].box_xyxy == (0, 1, 2, 3)


def test_an_unknown_field_is_named_with_the_nearest_known_one():
    assert "'widht'; did you mean 'width'?" in why_not(widht=3)
    assert "regions[0]: unknown field 'bbox'; did you mean 'box_xyxy'?" in why_not(regions=[{"bbox": [0, 0, 1, 1]}])
    assert "known: image, width" in why_not(zzz=1)


def test_missing_and_blank_fields_are_named():
    with pytest.raises(ValidationError) as caught:
        Record.model_validate({"image": "a", "width": 3})
    assert explain(caught.value) == "height: Field required"
    assert "regions[0].texts[0]: is blank" in why_not(regions=[{"box_xyxy": [0, 0, 1, 1], "texts": [" "]}])
    assert "captions[0]" in why_not(captions=["half a pair: \ud800"])


def test_a_phrase_cannot_be_present_and_absent():
    assert "absent" in why_not(absent=["The  CUP"], regions=[{"box_xyxy": [0, 0, 1, 1], "texts": ["the cup"]}])


def test_records_are_frozen():
    with pytest.raises(ValidationError):
        make_record().width = 3


# --- masks


def test_mask_round_trip_and_counts_in_three_forms():
    pixels = np.zeros((80, 100), bool)
    pixels[3:9, 40:77] = True
    rle = encode_mask(pixels)
    runs = [int(run) for run in np.diff(np.flatnonzero(np.diff(np.r_[2, pixels.T.ravel(), 2])))]
    for counts in (rle["counts"], rle["counts"].encode(), runs):
        region = Region.model_validate({"box_xyxy": [0, 0, 1, 1], "mask": {"size": [80, 100], "counts": counts}})
        assert region.mask is not None
        assert region.mask.counts == rle["counts"]
        assert (region.mask.to_array() == pixels).all()


@given(st.integers(0, 2**32 - 1), st.integers(1, 30), st.integers(1, 30), st.floats(0, 1))
def test_our_reading_of_counts_agrees_with_pycocotools(seed, height, width, density):
    pixels = np.random.default_rng(seed).random((height, width)) < density
    rle = encode_mask(pixels)
    assert (decode_mask(rle["size"], rle["counts"]) == pixels).all()


@given(st.text(max_size=20))
def test_broken_counts_never_reach_pycocotools(counts):
    try:
        assert decode_mask((4, 5), counts).shape == (4, 5)
    except ValueError as error:
        assert "mask counts" in str(error)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ({"size": [100, 80], "counts": [0, 8000]}, "[height, width] = [80, 100]"),
        ({"size": [80, 100], "counts": [0, 8001]}, "cover 8001 pixels"),
        ({"size": [80, 100], "counts": [8000]}, "no pixel"),
        ({"size": [80, 100], "counts": [-1, 8001]}, ">= 0"),
        ({"size": [80], "counts": "x"}, "2 numbers"),
        ({"size": [80, None], "counts": [0, 8000]}, "whole numbers"),
        ({"size": [-80, -100], "counts": [0, 8000]}, "cannot have the size"),
        ({"size": [10**6, 10**6], "counts": [0, 10**12]}, "cannot have the size"),
        ({"counts": "x"}, "size"),
    ],
)
def test_a_bad_mask_is_refused(mask, message):
    assert message in why_not(regions=[{"box_xyxy": [0, 0, 1, 1], "mask": mask}])


def test_polygons_are_filled_and_degenerate_ones_left_out():
    mask = polygons_to_mask([[10, 10, 20, 10, 20, 30, 10, 30], [0, 0, 50, 50]], 100, 80)
    assert mask is not None
    pixels = decode_mask(mask["size"], mask["counts"])
    assert pixels[10:30, 10:20].all()
    assert pixels.sum() == 200  # the list of four numbers did not become a box
    assert polygons_to_mask([[0, 0, 50, 50]], 100, 80) is None
    assert polygons_to_mask([[-9, -9, -5, -9, -5, -5]], 100, 80) is None
    for polygon in ([0, 0, 1, 1, 2, 2, 3], [0, 0, 1, math.nan, 2, 2], [0, 0, 1, "1", 2, 2]):
        with pytest.raises(ValueError, match="polygon"):
            polygons_to_mask([polygon], 100, 80)


def test_compress_counts_takes_whole_numbers_only():
    assert decode_mask((2, 2), compress_counts((2, 2), [1, 2, 1])).sum() == 2
    with pytest.raises(ValueError, match="whole numbers"):
        compress_counts((2, 2), [1, 2, 1.0])  # pyright: ignore


# --- phrases


def test_phrases_with_one_and_several_referents():
    record = make_record(
        regions=[
            {"box_xyxy": [0, 0, 1, 1], "texts": ["The  cup", "the red cup", "the CUP"]},
            {"box_xyxy": [2, 2, 3, 3], "texts": ["the cup"]},
            {"box_xyxy": [4, 4, 5, 5], "texts": ['the text "TOTAL"', 'THE text "total"']},
        ],
        points=[{"xy": [1, 1], "texts": ["the red cup"]}],
        absent=["the dog"],
    )
    assert phrase_referents(record) == {"the cup": [0, 1], "the red cup": [0], 'the text "total"': [2]}
    assert unique_texts(record) == {"the red cup": 0, 'the text "total"': 2}
    assert shared_texts(record) == {"the cup": [0, 1]}
    assert unique_phrases(record) == [("the red cup", 0), ('the text "TOTAL"', 2)]


@given(st.text())
def test_normalising_twice_changes_nothing_more_than_once(text):
    once = normalise_phrase(text)
    assert " ".join(once.split()) == once
    assert normalise_phrase(f"  {once}\t") == normalise_phrase(once)
