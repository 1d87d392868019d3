"""Which embeddings a probe gets, and for which regions."""

import numpy as np
import pytest
import torch

from regiontower.eval.probe.labels import object_classes, object_labels, text_labels, transcripts
from regiontower.eval.probe.regions import labelled_regions, reader, remembered
from regiontower.train_stages.normalise import PixelNorm
from regiontower.train_stages.records import Record, Region
from regiontower.train_stages.region_labels import ObjectClasses
from regiontower.vision_towers import UmgClipVisionModel, UserError, describe_tower, encode_regions


@pytest.fixture(scope="module")
def cache(squares):
    return squares(7, 3)


def test_things_and_texts_are_told_apart(cache):
    classes = ObjectClasses.of(cache.records, "tags", stuff=True)
    things = [object_labels(classes)(record) for record in cache.records]
    assert all(second == -1 and first >= 0 for first, second in things)  # the second square is a text
    words = transcripts(cache.records)
    assert words == sorted(set(words)) and set(words) <= {"red", "green", "blue"}
    for record in cache.records:
        assert text_labels(words)(record) == [-1, words.index(record.regions[1].ocr)]
    assert text_labels(["nothing"])(cache.records[0]) == [-1, -1]


def test_ground_counts_and_neither_texts_nor_crowds_do():
    def region(category, **fields):
        return Region(box_xyxy=(0, 0, 9, 9), category=category, **fields)

    regions = [region("dog"), region("dog", stuff=True), region("grass", stuff=True), region("sign", ocr="STOP")]
    record = Record(image="a.png", width=9, height=9, regions=regions)
    names, labels = object_classes([record], "category")
    assert names == ["dog", "grass"] and labels(record) == [0, -1, 1, -1]
    assert object_classes([record.model_copy(update={"regions": regions[3:]})], "category")[0] == []
    with pytest.raises(UserError, match="use cluster, category or tags"):
        object_classes([record], "names")


def test_features_are_those_of_the_region_in_its_image(rice_tower, cache):
    words = transcripts(cache.records)
    found = labelled_regions(reader(rice_tower, "own"), cache, text_labels(words))
    assert found.images.tolist() == list(range(7)) and len(found) == 7
    spec = describe_tower(rice_tower.config)
    norm = PixelNorm(spec.image_mean, spec.image_std)
    with torch.inference_mode():
        for row, record in enumerate(cache.records):
            box = torch.tensor([record.regions[1].box_xyxy])
            pixels = norm(torch.from_numpy(np.array(cache.pixels[row : row + 1])))
            expected = encode_regions(rice_tower, pixels, [box])[0][0]
            torch.testing.assert_close(torch.from_numpy(found.features[row]), expected, atol=1e-4, rtol=1e-4)
            assert words[found.classes[row]] == record.regions[1].ocr


def test_the_other_readouts_are_those_of_the_native_tower(rice_tower, cache):
    labels = text_labels(transcripts(cache.records))
    value = labelled_regions(reader(rice_tower, "value"), cache, labels)
    wrapped = UmgClipVisionModel.from_native(rice_tower.to_native(), pooling="value")
    expected = labelled_regions(reader(wrapped, "own"), cache, labels)
    np.testing.assert_allclose(value.features, expected.features, atol=1e-5)
    apart = [labelled_regions(reader(rice_tower, name), cache, labels).features for name in ("own", "roi", "crops")]
    for index, one in enumerate([value.features, *apart]):
        for other in apart[index:]:
            assert np.abs(one - other).max() > 1e-3


def test_reading_stops_after_enough_regions_and_takes_none_for_none(rice_tower, cache):
    read = reader(rice_tower, "own")
    assert labelled_regions(read, cache, lambda record: [0, 1], most=3).images.tolist() == [0, 0, 1, 1]
    assert len(labelled_regions(read, cache, lambda record: [-1, -1])) == 0


def test_an_unknown_readout_names_the_others(rice_tower):
    with pytest.raises(UserError, match="own, roi, value, map, crops"):
        reader(rice_tower, "magic")


def test_a_remembered_reader_gives_the_same_and_reads_each_image_once(rice_tower, cache):
    read, seen = reader(rice_tower, "own"), []

    def counted(cache, rows, *rest):
        seen.extend(rows)
        return read(cache, rows, *rest)

    once = remembered(counted)
    for labels in (lambda record: [0, -1], lambda record: [-1, 1], lambda record: [1, 0]):
        found, expected = labelled_regions(once, cache, labels), labelled_regions(read, cache, labels)
        np.testing.assert_allclose(found.features, expected.features, atol=1e-4)
        assert (found.classes == expected.classes).all() and (found.images == expected.images).all()
    assert sorted(seen) == list(range(7))
