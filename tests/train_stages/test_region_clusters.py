"""Region features and their k-means: what is grouped, that it repeats, and what is written."""

from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file

from regiontower.mllm.boxes import Boxes, letterbox_image, mean_colour
from regiontower.train_stages.cluster_quality import cluster_quality
from regiontower.train_stages.masks import encode_mask
from regiontower.train_stages.normalise import PixelNorm
from regiontower.train_stages.pixels import PixelCache
from regiontower.train_stages.record_io import RecordSet, read_records, write_records
from regiontower.train_stages.records import Mask, Record, Region
from regiontower.train_stages.region_clusters import ClusterConfig, cluster_regions, write_clustered
from regiontower.train_stages.region_features import _in_input, crop_features, region_features
from regiontower.vision_towers import RiceVisionConfig, RiceVisionModel, describe_tower
from regiontower.vision_towers.errors import UserError

SIZE = 56
COLORS = ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255))
BOXES = ((0, 0, 28, 28), (28, 0, 56, 28), (0, 28, 28, 56), (28, 28, 56, 56))


@pytest.fixture(scope="module")
def tower():
    torch.manual_seed(0)
    config = RiceVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        patch_size=14,
        image_size=SIZE,
        num_region_layers=1,
        initializer_range=0.2,
    )
    return RiceVisionModel(config).eval()


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """Eight pictures of four coloured quarters in a new order each."""
    root, rng, found = tmp_path_factory.mktemp("quarters"), np.random.default_rng(0), []
    for number in range(8):
        picture = Image.new("RGB", (SIZE, SIZE))
        order = rng.permutation(4)
        for color, box in zip(order, BOXES, strict=True):
            picture.paste(COLORS[color], box)
        picture.save(root / f"{number}.png")
        regions = [Region(box_xyxy=box, category=str(color)) for color, box in zip(order, BOXES, strict=True)]
        found.append(Record(image=f"{number}.png", width=SIZE, height=SIZE, regions=regions))
    write_records(root / "records.jsonl", found)
    return read_records(root / "records.jsonl")


@pytest.fixture(scope="module")
def cache(records: RecordSet):
    return PixelCache.build(records, SIZE, progress=False)


def boxes_of(cache):
    return [Boxes([region.box_xyxy for region in record.regions]) for record in cache.records]


def test_region_features_are_the_towers_own(tower, cache):
    found = list(region_features(tower, cache, range(8), boxes_of(cache), batch_size=3))
    spec = describe_tower(tower.config)
    norm = PixelNorm(spec.image_mean, spec.image_std)
    for row, boxes in enumerate(boxes_of(cache)):
        pixels = norm(torch.from_numpy(cache.pixels[row : row + 1]))
        with torch.inference_mode():
            alone = tower(pixels, boxes=boxes.tensor()[None]).region_embeds[0]
        torch.testing.assert_close(found[row], alone, atol=1e-5, rtol=1e-4)


def test_crop_features_are_those_of_the_cut_out_picture(tower, cache):
    """Margin 1.05 around a quarter of 28 px: a window of 30 px, moved inside the picture."""
    found = next(crop_features(tower, cache, [2], [boxes_of(cache)[2]], batch_size=3, side=28))
    spec = describe_tower(tower.config)
    norm = PixelNorm(spec.image_mean, spec.image_std)
    window = torch.from_numpy(cache.pixels[2][:, 0:30, 26:56])[None]
    resized = torch.nn.functional.interpolate(window, size=(28, 28), mode="bilinear", antialias=True)
    with torch.inference_mode():
        alone = tower(norm(resized)).pooler_output[0]
    torch.testing.assert_close(found[1], alone, atol=1e-5, rtol=1e-4)
    assert found.shape == (4, 32)


def test_what_lies_outside_of_a_mask_is_filled(tower, cache):
    """Everything but the lower half of one quarter is gray: the feature of a picture painted so."""
    inside = np.zeros((SIZE, SIZE), dtype=bool)
    inside[14:28, 28:56] = True
    box = Boxes([BOXES[1]])
    found = next(crop_features(tower, cache, [2], [box], 3, side=28, masks=[[Mask(**encode_mask(inside))]]))
    spec = describe_tower(tower.config)
    painted = np.where(inside, cache.pixels[2], np.array(mean_colour(spec.image_mean), np.uint8)[:, None, None])
    whole = PixelCache(painted[None], cache.frames[:1], cache.records[:1], [])
    alone = next(crop_features(tower, whole, [0], [box], 3, side=28))
    torch.testing.assert_close(found, alone)
    plain = next(crop_features(tower, cache, [2], [box], 3, side=28, masks=[[None]]))
    assert not torch.allclose(found, plain, atol=1e-3)


@pytest.mark.parametrize("size", [(80, 40), (40, 80), (56, 56)])
def test_a_mask_lies_where_its_pixels_lie(size):
    """The mask of a white blob, taken to the input, is the blob of the letterboxed picture."""
    rng = np.random.default_rng(0)
    width, height = size
    inside = np.zeros((height, width), dtype=bool)
    inside[5:31, 8:33] = True
    inside[:4] = rng.random((4, width)) > 0.5  # touches the edge
    picture = Image.fromarray(inside).convert("RGB")
    square, frame = letterbox_image(picture, SIZE, (0, 0, 0))
    found = _in_input(Mask(**encode_mask(inside)), frame).numpy()
    seen = np.asarray(square)[..., 0]
    clear = (seen < 20) | (seen > 235)  # between them interpolation decides
    rows = slice(round(5 * frame.scale[1] + frame.offset[1]) - 1, None)  # below the noise
    assert (found == (seen > 127))[rows][clear[rows]].mean() > 0.99
    assert found.shape == (SIZE, SIZE) and found.any()


@pytest.mark.parametrize("feature", ["crop", "region"])
def test_equal_things_fall_into_one_cluster_again_and_again(tower, cache, feature):
    pytest.importorskip("faiss", reason="clusters need faiss")
    config = ClusterConfig(feature=feature, batch_size=5)
    found = cluster_regions(tower, cache, 8, config)
    again = cluster_regions(tower, cache, 8, config)
    assert all(np.array_equal(a, b) for a, b in zip(found.labels, again.labels, strict=True))
    np.testing.assert_allclose(np.linalg.norm(found.centres, axis=1), 1.0, rtol=1e-4)
    of_cluster: dict[int, Counter] = {}
    for record, labels in zip(cache.records, found.labels, strict=True):
        for region, label in zip(record.regions, labels, strict=True):
            of_cluster.setdefault(int(label), Counter())[region.category] += 1
    purity = sum(max(counts.values()) for counts in of_cluster.values()) / 32
    # A quarter is seen alone by "region"; a crop with its margin also shows its neighbours.
    assert purity > (0.7 if feature == "region" else 0.4)


def test_clusters_are_written_beside_the_rest_of_the_record(tower, records, tmp_path):
    pytest.importorskip("faiss", reason="clusters need faiss")
    out = write_clustered(records, tower, 4, tmp_path / "clustered.jsonl", ClusterConfig("region"))
    written = read_records(out, image_root=records.root).records
    bare = [
        record.model_copy(update={"regions": [r.model_copy(update={"cluster": None}) for r in record.regions]})
        for record in written
    ]
    assert bare == records.records
    assert {region.cluster for record in written for region in record.regions} == {0, 1, 2, 3}
    assert load_file(tmp_path / "clustered.centres.safetensors")["centres"].shape == (4, 32)


def test_too_many_clusters_are_refused(tower, cache):
    pytest.importorskip("faiss", reason="clusters need faiss")
    with pytest.raises(UserError, match="at most 16"):
        cluster_regions(tower, cache, 17)


def test_quality_of_clusters_by_hand():
    """Cluster 0: red star twice, blue star once; cluster 1: blue star alone; one unclustered and one unnamed region."""
    regions = [
        Region(box_xyxy=(0, 0, 5, 5), category="star", tags=[color], cluster=cluster)
        for color, cluster in (("red", 0), ("red", 0), ("blue", 0), ("blue", 1), ("blue", None))
    ]
    regions.append(Region(box_xyxy=(0, 0, 5, 5), cluster=1))
    found = cluster_quality([Record(image="a.png", width=9, height=9, regions=regions)])
    assert (found["regions"], found["names"], found["clusters"]) == (4, 2, 2)
    assert found["purity"] == pytest.approx(3 / 4)
    assert found["nmi"] == pytest.approx(0.3437, abs=1e-3)  # I = 0.2158 nats over the mean of H = 0.6931 and 0.5623
    assert cluster_quality([]) == {"regions": 0}
