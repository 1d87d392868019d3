"""A detector on the tokens of a frozen tower."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torchvision.models.detection.image_list import ImageList

from regiontower.eval.probe.detection import (
    DetectConfig,
    Places,
    average_precision,
    coco_truth,
    detect,
    detection,
    detection_line,
    train_detector,
)
from regiontower.eval.probe.pyramid import FrozenPyramid
from regiontower.mllm.boxes import ImageFrame
from regiontower.train_stages.region_labels import ObjectClasses
from regiontower.vision_towers import UserError, describe_tower

SMALL = DetectConfig(60, batch_size=8, lr=3e-3, width=32)


@pytest.fixture(scope="module")
def caches(squares):
    """Squares of one class, to learn from and to be found: all of them objects, none a text."""
    found = []
    for cache in (squares(48, 11), squares(12, 12)):
        records = [
            record.model_copy(update={"regions": [r.model_copy(update={"ocr": None}) for r in record.regions]})
            for record in cache.records
        ]
        found.append(replace(cache, records=records))
    return found


@pytest.fixture(scope="module")
def classes(caches):
    return ObjectClasses.of(caches[0].records, "category", stuff=False)


def test_it_finds_squares_with_a_tower_that_stays(rice_tower, caches, classes):
    before = {name: value.clone() for name, value in rice_tower.state_dict().items()}
    found = detection(rice_tower, *caches, classes, SMALL)
    assert found["ap50"] > 0.5 and found["ap50"] > found["ap"] > 0.1 and found["n"] == 24
    assert f"AP50 {found['ap50']:.3f}" in detection_line(found)
    assert all(torch.equal(value, before[name]) for name, value in rice_tower.state_dict().items())
    assert all(weight.grad is None for weight in rice_tower.parameters()) and not rice_tower.training
    untrained = detection(rice_tower, *caches, classes, replace(SMALL, steps=1))
    assert untrained["ap50"] < 0.1


def test_boxes_are_those_of_the_original_image(rice_tower, caches, classes):
    """The same pixels, said to come from images of twice the size."""
    spec = describe_tower(rice_tower.config)
    detector = train_detector(rice_tower, spec, caches[0], classes, replace(SMALL, steps=2))
    test = caches[1]
    twice = replace(test, frames=[ImageFrame.resize((112, 112), (56, 56))] * len(test))
    assert detector.transform([torch.zeros(3, 56, 56)])[0].tensors.shape[-2:] == (64, 64)  # whole places of 32 px
    small, large = detect(detector, spec, test), detect(detector, spec, twice)
    assert len(small) == len(large) > 0
    for one, other in zip(small, large, strict=True):
        np.testing.assert_allclose(np.array(one["bbox"]) * 2, other["bbox"], atol=1e-4)


def test_the_same_seed_gives_the_same_detector(rice_tower, caches, classes):
    spec, config = describe_tower(rice_tower.config), replace(SMALL, steps=2)
    first = train_detector(rice_tower, spec, caches[0], classes, config).state_dict()
    again = train_detector(rice_tower, spec, caches[0], classes, config).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_the_levels_are_those_of_rice(rice_tower):
    """7 x 7 patches of 8 px: tokens are padded, so that the coarsest level, of 32 px, has whole places."""
    pyramid = FrozenPyramid(rice_tower, describe_tower(rice_tower.config), 56, 32)
    maps = pyramid(torch.randn(2, 3, 64, 64))
    assert [tuple(level.shape) for level in maps.values()] == [(2, 32, side, side) for side in (32, 16, 8, 4, 2)]
    assert not any(name.startswith("_tower") for name, _ in pyramid.named_parameters())


def test_points_lie_in_the_middle_of_places_also_of_broken_strides():
    """A patch of 14 px: levels of 3.5 px and 28 px on two images of 56 x 28."""
    batch = ImageList(torch.zeros(2, 3, 28, 56), [(28, 56)] * 2)
    found = Places(2)(batch, [torch.zeros(2, 1, 8, 16), torch.zeros(2, 1, 1, 2)])
    assert len(found) == 2 and torch.equal(found[0], found[1]) and found[0].shape == (8 * 16 + 2, 4)
    assert found[0][[0, 1, 16]].tolist() == [[0, 0, 3.5, 3.5], [3.5, 0, 7, 3.5], [0, 3.5, 3.5, 7]]
    assert found[0][-2:].tolist() == [[0, 0, 28, 28], [28, 0, 56, 28]]


def test_the_truth_is_found_and_crowds_count_neither_way(caches, classes):
    test = caches[1]
    truth = coco_truth(test, classes)
    exact = [{k: row[k] for k in ("image_id", "category_id", "bbox")} | {"score": 0.9} for row in truth["annotations"]]
    assert average_precision(truth, exact) == {"ap": 1.0, "ap50": 1.0, "ap75": 1.0}
    assert average_precision(truth, exact[::2])["ap50"] == pytest.approx(0.5, abs=0.02)
    assert average_precision(truth, []) == {"ap": 0.0, "ap50": 0.0, "ap75": 0.0}
    # Every second region a crowd: finding it is neither right nor wrong.
    records = [
        r.model_copy(update={"regions": [r.regions[0], r.regions[1].model_copy(update={"stuff": True})]})
        for r in test.records
    ]
    crowded = coco_truth(replace(test, records=records), classes)
    assert sum(row["iscrowd"] for row in crowded["annotations"]) == 12
    assert average_precision(crowded, exact)["ap"] == average_precision(crowded, exact[::2])["ap"] == 1.0


def test_what_cannot_be_learned_is_one_sentence(rice_tower, caches, classes):
    empty = replace(caches[1], records=[r.model_copy(update={"regions": []}) for r in caches[1].records])
    with pytest.raises(UserError, match="learn from"):
        detection(rice_tower, empty, caches[1], classes, SMALL)
    with pytest.raises(UserError, match="nothing can be detected"):
        detection(rice_tower, caches[0], empty, classes, replace(SMALL, steps=1))
    with pytest.raises(UserError, match="multiple of 32"):
        DetectConfig(5, width=48)
    with pytest.raises(UserError, match="1 or more"):
        DetectConfig(0)
