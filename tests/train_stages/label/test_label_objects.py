"""RICE's object labels from raw images: candidates, features, clusters."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.numpy import load_file
from torchvision.ops import box_iou

from regiontower.mllm.boxes import Boxes, mean_colour
from regiontower.train_stages.label import ImageSource, RunConfig
from regiontower.train_stages.label.cluster_page import Nearest, cluster_page, shown_clusters
from regiontower.train_stages.label.object_clusters import KMeansConfig, label_objects
from regiontower.train_stages.label.objects import ObjectsConfig
from regiontower.train_stages.label.proposals import mask_box
from regiontower.train_stages.label.segments import segment_boxes
from regiontower.train_stages.label.shard import read_rows
from regiontower.train_stages.masks import decode_mask
from regiontower.train_stages.pixels import PixelCache, to_pixels
from regiontower.train_stages.record_io import read_records
from regiontower.train_stages.records import Record, Region
from regiontower.train_stages.region_features import region_features
from regiontower.train_stages.webdataset import read_shard
from regiontower.vision_towers import RiceVisionConfig, RiceVisionModel, describe_tower, load_tower
from regiontower.vision_towers.errors import UserError

COLORS = ("red", "blue", "green", "yellow")
PLACES = ((10, 12, 150, 170), (200, 20, 360, 160), (220, 200, 380, 350))  # each at least 128 px
RUN = RunConfig(per_shard=3, batch_size=2, device="cpu", progress=False)


@pytest.fixture(scope="module")
def tower_dir(tmp_path_factory):
    torch.manual_seed(0)
    config = RiceVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        patch_size=14,
        image_size=112,
        num_region_layers=1,
        initializer_range=0.2,
    )
    folder = tmp_path_factory.mktemp("tower")
    RiceVisionModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Seven pictures with three coloured squares each, at fixed places, and one that is too small."""
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for number in range(7):
        noise = rng.integers(90, 110, (380, 400, 3), dtype=np.uint8)
        picture = Image.fromarray(noise)
        for place, color in zip(PLACES, rng.permutation(COLORS), strict=False):
            ImageDraw.Draw(picture).rectangle((place[0], place[1], place[2] - 1, place[3] - 1), fill=str(color))
        picture.save(folder / f"{number}.png")
    Image.new("RGB", (500, 335)).save(folder / "small.png")
    return folder


@pytest.fixture
def boxed(photos, tmp_path):
    """Their boxes as records, with a small one that is no candidate."""
    lines = []
    for number in range(7):
        boxes = [*PLACES, (0, 0, 127, 300)]
        regions = [Region(box_xyxy=box) for box in boxes]
        lines.append(Record(image=str(photos / f"{number}.png"), width=400, height=380, regions=regions))
    path = tmp_path / "boxed.jsonl"
    path.write_text("".join(line.model_dump_json() + "\n" for line in lines))
    return ImageSource(path, "records")


def labelled(result):
    return [record for path in result.shards for record in read_records(path, check_images=True).records]


def test_segments_find_what_stands_out(photos):
    boxes, scores = segment_boxes(Image.open(photos / "0.png"))
    overlap = box_iou(torch.tensor(PLACES, dtype=torch.float32), torch.from_numpy(boxes))
    assert (overlap.max(dim=1).values > 0.9).all()
    best = torch.from_numpy(scores).argsort(descending=True)[:12]
    assert (overlap[:, best].max(dim=1).values > 0.9).all()
    again = segment_boxes(Image.open(photos / "0.png"))
    assert np.array_equal(boxes, again[0]) and np.array_equal(scores, again[1])
    assert len(segment_boxes(Image.new("RGB", (90, 60)))[0]) >= 1  # nothing in it, and no error


def test_candidates_are_large_boxes_in_large_images(photos, tower_dir, tmp_path):
    pytest.importorskip("faiss")
    config = ObjectsConfig(str(tower_dir), proposals="segments", max_regions=5, feature="crop")
    result = label_objects(config, KMeansConfig(4), ImageSource(photos), tmp_path / "out", RUN)
    assert result.passed_over == {"image too small": 1}
    records = labelled(result)
    assert len(records) == 7
    for record in records:
        sides = [min(x1 - x0, y1 - y0) for x0, y0, x1, y1 in (region.box_xyxy for region in record.regions)]
        assert 1 <= len(sides) <= 5 and min(sides) >= 128
        boxes = torch.tensor([region.box_xyxy for region in record.regions])
        assert (box_iou(boxes, boxes).fill_diagonal_(0) <= 0.7).all()
        assert all(region.cluster is not None and region.source for region in record.regions)


def test_clusters_are_those_of_the_towers_features(photos, boxed, tower_dir, tmp_path):
    """Nearest centres of features that are computed here, from the boxes of records."""
    pytest.importorskip("faiss")
    config = ObjectsConfig(str(tower_dir), proposals="record", feature="region")
    result = label_objects(config, KMeansConfig(4), boxed, tmp_path / "out", RUN)
    centres = load_file(tmp_path / "out" / "centres.safetensors")["centres"]
    assert centres.shape == (4, 32)
    np.testing.assert_allclose(np.linalg.norm(centres, axis=1), 1, rtol=1e-4)
    tower = load_tower(tower_dir)
    fill = mean_colour(describe_tower(tower.config).image_mean)
    of_color: dict = {}
    for record in labelled(result):
        assert record.regions[3].cluster is None  # too narrow
        image = Image.open(tmp_path / "out" / record.image)
        pixels, frame = to_pixels(image, 112, fill)
        cache = PixelCache(pixels[None], [frame], [record], [])
        boxes = frame.to_input(Boxes([region.box_xyxy for region in record.regions[:3]]))[0]
        features = next(region_features(tower, cache, [0], [boxes], 1)).numpy()
        features /= np.linalg.norm(features, axis=1, keepdims=True)
        nearest = np.linalg.norm(features[:, None] - centres, axis=-1).argmin(axis=1)
        assert [region.cluster for region in record.regions[:3]] == nearest.tolist()
        for region in record.regions[:3]:
            color = image.getpixel((region.box_xyxy[0] + 40, region.box_xyxy[1] + 40))
            of_color.setdefault(color, set()).add(region.cluster)
    assert len(of_color) == 4 and len({min(found) for found in of_color.values()}) >= 3


def test_clusters_in_two_levels_and_where_they_come_from(boxed, tower_dir, tmp_path):
    """Both branches are searched, so every region has its very nearest centre; `labels.json` names the k-means."""
    pytest.importorskip("faiss")
    config = ObjectsConfig(str(tower_dir), proposals="record", feature="region")
    result = label_objects(config, KMeansConfig(6, branches=2), boxed, tmp_path / "out", RUN)
    held = load_file(tmp_path / "out" / "centres.safetensors")
    assert held["centres"].shape == (6, 32) and held["branches"].shape == (2, 32)
    rows = np.concatenate([read_rows(tmp_path / "out" / "regions", index) for index in range(3)]).astype(np.float32)
    regions = [region for record in labelled(result) for region in record.regions]
    assert len(regions) == len(rows)
    for region, row in zip(regions, rows, strict=True):
        wanted = None if np.isnan(row[0]) else int((held["centres"] @ row).argmax())
        assert region.cluster == wanted
    facts = json.loads((tmp_path / "out" / "labels.json").read_text())[result.source]
    assert "regions.cluster" in facts["writes"] and facts["settings"]["box_min_edge"] == 128
    assert (facts["clusters"]["clusters"], facts["clusters"]["branches"]) == (6, 2)
    assert not list((tmp_path / "out").glob(".k*")) and not (tmp_path / "out" / ".assigned").exists()


def test_masks_of_a_sam_are_kept(photos, tower_dir, tiny_sam_dir, tmp_path):
    pytest.importorskip("faiss")
    config = ObjectsConfig(
        str(tower_dir), mask_model=str(tiny_sam_dir), min_mask_iou=-9, min_mask_stability=-9, points_per_side=2
    )
    result = label_objects(config, KMeansConfig(2), ImageSource(photos), tmp_path / "out", RUN)
    regions = [region for record in labelled(result) for region in record.regions]
    assert regions
    for region in regions:
        mask = decode_mask(region.mask.size, region.mask.counts)
        assert mask.shape == (380, 400) and mask_box(mask) == region.box_xyxy
    labels = json.loads((tmp_path / "out" / "labels.json").read_text())
    (facts,) = labels.values()
    assert facts["models"]["masks"]["revision"].startswith("sha256:")


def test_the_second_half_can_be_broken_off(boxed, tower_dir, tmp_path):
    pytest.importorskip("faiss")
    config = ObjectsConfig(str(tower_dir), proposals="record", feature="region")
    out = tmp_path / "out"
    label_objects(config, KMeansConfig(4), boxed, out, RUN)
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    assert {"00000.jsonl", "00002.jsonl", "centres.safetensors", "clusters.png", "labels.json"} <= set(before)
    for name in ("clusters.png", "00001.jsonl"):
        (out / name).unlink()
    (out / ".parts").mkdir()
    label_objects(config, KMeansConfig(4), boxed, out, RUN)
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()} == before
    with pytest.raises(UserError, match=r"another k-means .*delete it"):
        label_objects(config, KMeansConfig(5), boxed, out, RUN)
    (out / "centres.safetensors").unlink()
    label_objects(config, KMeansConfig(5), boxed, out, RUN)
    assert load_file(out / "centres.safetensors")["centres"].shape == (5, 32)
    assert (out / "clusters.png").read_bytes() != before["clusters.png"]


def test_a_page_has_at_most_twelve_clusters_and_cuts_out_thin_regions(tmp_path):
    for clusters, rows in ((1, 1), (5, 5), (12, 12), (13, 7), (23, 12), (1000, 12)):
        shown = shown_clusters(clusters)
        assert len(shown) == rows and max(shown) < clusters
    picture = Image.new("RGB", (60, 40), "white")
    picture.paste("red", (10, 0, 11, 40))
    picture.save(tmp_path / "a.png")
    nearest = Nearest([3])
    nearest.offer(3, 0.9, "a.png", (10.2, 1.0, 10.4, 39.0))
    assert (255, 0, 0) in {color for _, color in cluster_page(nearest, tmp_path).getcolors(10**6)}


def test_clusters_in_webdataset_shards(boxed, tower_dir, tmp_path):
    pytest.importorskip("faiss")
    pytest.importorskip("webdataset")
    config = ObjectsConfig(str(tower_dir), proposals="record", feature="region")
    run = RunConfig(per_shard=4, batch_size=4, device="cpu", progress=False, form="webdataset")
    result = label_objects(config, KMeansConfig(2), boxed, tmp_path / "out", run)
    found = [record for path in result.shards for record, data in read_shard(path) if data]
    assert [path.name for path in result.shards] == ["00000.tar", "00001.tar"]
    with pytest.raises(UserError, match="shards of another --form"):
        label_objects(config, KMeansConfig(2), boxed, tmp_path / "out", replace(run, form="jsonl"))
    assert len(found) == 7 and {region.cluster for record in found for region in record.regions[:3]} == {0, 1}


def test_what_a_user_gets_wrong(boxed, photos, tower_dir, tmp_path):
    pytest.importorskip("faiss")
    with pytest.raises(UserError, match="--mask-model"):
        label_objects(ObjectsConfig(str(tower_dir)), KMeansConfig(2), boxed, tmp_path / "a", RUN)
    config = ObjectsConfig(str(tower_dir), proposals="record", feature="region")
    with pytest.raises(UserError, match="21 regions are too few for 11 clusters; ask for at most 10"):
        label_objects(config, KMeansConfig(11), boxed, tmp_path / "b", RUN)
    assert label_objects(config, KMeansConfig(10), boxed, tmp_path / "b", RUN).records == 7  # nothing was lost
    with pytest.raises(UserError, match="no model can be opened"):
        label_objects(ObjectsConfig("./nowhere", proposals="record"), KMeansConfig(2), boxed, tmp_path / "c", RUN)
