"""Labels, random views, items and batches of stage 0."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from regiontower.mllm.boxes import Boxes
from regiontower.train_stages.augment import AugmentConfig, random_view
from regiontower.train_stages.pixels import PixelCache
from regiontower.train_stages.pretrain_data import CaptionItems, RegionItems
from regiontower.train_stages.pretrain_items import CachedItems
from regiontower.train_stages.record_io import RecordSet
from regiontower.train_stages.records import Record, Region
from regiontower.train_stages.region_labels import NO_CLASS, ObjectClasses, TextClasses, open_tokenizer
from regiontower.train_stages.tokenizer import train_tokenizer
from regiontower.vision_towers.errors import UserError

STILL = AugmentConfig(1.0, 0.0, 0.0)
SIZE = 56


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_tokenizer(["open the door", "stop here", "to be or not to be"], tmp_path_factory.mktemp("tok"), 512)


def region(x, category=None, **fields):
    return Region(box_xyxy=(x, 4, x + 12, 20), category=category, **fields)


RECORDS = [
    Record(
        image="0.png",
        width=SIZE,
        height=SIZE,
        captions=["a cup", "a dog and a cup"],
        regions=[
            region(0, "dog", cluster=3),
            region(14, "cup", cluster=0),
            region(28, ocr="to be or not to be"),
            region(40),
        ],
    ),
    Record(image="1.png", width=SIZE, height=SIZE, regions=[region(4, "grass", stuff=True), region(20, "cup")]),
    Record(image="2.png", width=SIZE, height=SIZE, captions=["nothing here"]),
]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    for i in range(len(RECORDS)):
        Image.new("RGB", (SIZE, SIZE), (i, i, i)).save(root / f"{i}.png")
    return PixelCache.build(RecordSet(root, root, RECORDS), SIZE, progress=False)


def test_category_classes():
    classes = ObjectClasses.of(RECORDS, "category", stuff=True)
    assert classes.names == ["cup", "dog", "grass"]
    assert classes.labels(RECORDS[0]) == [1, 0, NO_CLASS, NO_CLASS]
    assert classes.labels(RECORDS[1]) == [2, 0]
    unknown = Record(image="x", width=SIZE, height=SIZE, regions=[region(0, "unicorn")])
    assert classes.labels(unknown) == [NO_CLASS]


def test_stuff_can_be_left_out():
    classes = ObjectClasses.of(RECORDS, "category", stuff=False)
    assert classes.names == ["cup", "dog"]
    assert classes.labels(RECORDS[1]) == [NO_CLASS, 0]


def test_cluster_classes_keep_their_numbers():
    classes = ObjectClasses.of(RECORDS, "cluster", stuff=True)
    assert len(classes) == 4
    assert classes.labels(RECORDS[0]) == [3, 0, NO_CLASS, NO_CLASS]
    with pytest.raises(UserError, match=r"no region .* cluster"):
        ObjectClasses.of(RECORDS[1:], "cluster", stuff=True)


def test_text_classes_are_the_set_of_token_ids(tokenizer):
    texts = TextClasses(tokenizer)
    ids = tokenizer("to be or not to be", add_special_tokens=False)["input_ids"]
    assert len(set(ids)) < len(ids)
    assert texts.labels(RECORDS[0]) == [[], [], sorted(set(ids)), []]
    assert texts.token_set("stop<unk></s>") == texts.token_set("stop")
    assert len(texts) == len(tokenizer)


def test_a_wrong_tokenizer_path_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match=r"data\.tokenizer"):
        open_tokenizer(tmp_path)


def test_items_have_exactly_n_labelled_regions(cache, tokenizer):
    classes = ObjectClasses.of(RECORDS, "category", stuff=True)
    dataset = CachedItems(cache, RegionItems(classes, TextClasses(tokenizer), 5, STILL))
    assert len(dataset) == 2  # the image without regions contributes none
    batch = dataset.maker.collate([dataset[0], dataset[1]])
    assert batch["boxes"].shape == (2, 5, 4)
    assert batch["boxes"].dtype == torch.float32
    assert batch["region_counts"].tolist() == [5, 5]
    assert batch["pixel_values"].dtype == torch.uint8
    text = TextClasses(tokenizer).token_set(RECORDS[0].regions[2].ocr or "")
    expected = {0.0: (1, []), 14.0: (0, []), 28.0: (NO_CLASS, text)}  # the region without a label never comes
    seen = set()
    for box, label, ids in zip(batch["boxes"][0], batch["object_labels"][0], batch["ocr_labels"][0], strict=True):
        seen.add(box[0].item())
        assert (label.item(), ids[ids >= 0].tolist()) == expected[box[0].item()]
    assert seen == set(expected)


def test_without_a_tokenizer_regions_of_text_alone_are_left_out(cache):
    dataset = CachedItems(cache, RegionItems(ObjectClasses.of(RECORDS, "category", True), None, 4, STILL))
    batch = dataset.maker.collate([dataset[0]])
    assert set(batch["boxes"][0, :, 0].tolist()) == {0.0, 14.0}
    assert batch["ocr_labels"].tolist() == [[[NO_CLASS]] * 4]


def test_no_labelled_region_at_all_is_refused(cache):
    classes = ObjectClasses(["zebra"], "category", True)
    with pytest.raises(UserError, match="no image has a labelled region"):
        CachedItems(cache, RegionItems(classes, None, 4, STILL))


def test_captions_end_in_the_end_token_and_are_padded(cache, tokenizer):
    dataset = CachedItems(cache, CaptionItems(tokenizer, 4, STILL))
    assert len(dataset) == 2
    items = [dataset[i] for i in (0, 1) for _ in range(8)]
    batch = dataset.maker.collate(items)
    for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
        length = int(mask.sum())
        assert length <= 4
        assert row[length - 1] == tokenizer.eos_token_id
        assert (row[length:] == tokenizer.pad_token_id).all()
    assert len({tuple(row.tolist()) for row in batch["input_ids"][:8]}) == 2  # both captions of the first image


def test_a_view_without_change_is_the_image():
    pixels = torch.randint(0, 256, (3, SIZE, SIZE), dtype=torch.uint8)
    boxes = Boxes([[3, 4, 20, 30]])
    out, same, kept, _ = random_view(pixels, boxes, STILL, np.random.default_rng(0))
    assert torch.equal(out, pixels)
    assert same == boxes
    assert kept.tolist() == [0]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 40), st.integers(0, 40), st.integers(8, 16), st.integers(8, 16))
def test_boxes_follow_the_crop(seed, x, y, width, height):
    """White things on black: the box of each one kept covers exactly its white pixels in the view."""
    boxes = Boxes([[x, y, x + width, y + height]])
    pixels = torch.zeros(3, SIZE, SIZE, dtype=torch.uint8)
    pixels[:, y : y + height, x : x + width] = 255
    view, moved, kept, _ = random_view(pixels, boxes, AugmentConfig(0.5, 0.0, 0.0), np.random.default_rng(seed))
    assert kept.tolist() == [0]  # a view that loses its only box is given up
    ys, xs = (view[0] > 127).nonzero(as_tuple=True)
    found = [xs.min().item(), ys.min().item(), xs.max().item() + 1, ys.max().item() + 1]
    np.testing.assert_allclose(moved.xyxy[0], found, atol=1.5)


def test_boxes_less_than_half_visible_are_dropped():
    rng = np.random.default_rng(0)
    boxes = Boxes([[20, 20, 36, 36], [0, 0, 8, 8], [48, 48, 56, 56]])
    pixels = torch.zeros(3, SIZE, SIZE, dtype=torch.uint8)
    dropped = 0
    for _ in range(200):
        _, moved, kept, _ = random_view(pixels, boxes, AugmentConfig(0.6, 0.0, 0.0), rng)
        assert len(moved) == len(kept) > 0
        scale = (
            (moved.xyxy[list(kept).index(0), 2:] - moved.xyxy[list(kept).index(0), :2]).max() / 16 if 0 in kept else 1
        )
        for box, index in zip(moved, kept, strict=True):
            shown = (box[2] - box[0]) * (box[3] - box[1]) / scale**2
            assert shown >= 0.5 * boxes.area[index] - 1e-6
        dropped += len(kept) < 3
    assert dropped > 50


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 40), st.integers(0, 40), st.integers(4, 16), st.integers(4, 16))
def test_a_zoomed_view_shows_a_region_whole_and_larger(seed, x, y, width, height):
    boxes = Boxes([[x, y, x + width, y + height]])
    pixels = torch.zeros(3, SIZE, SIZE, dtype=torch.uint8)
    pixels[:, y : y + height, x : x + width] = 255
    config = AugmentConfig(1.0, 0.0, 0.0, zoom=1.0, zoom_max=2.0)
    view, moved, kept, _ = random_view(pixels, boxes, config, np.random.default_rng(seed), side=28)
    assert view.shape == (3, 28, 28) and kept.tolist() == [0]
    x1, y1, x2, y2 = moved.xyxy[0]
    assert max(x2 - x1, y2 - y1) >= 28 / 2.0 * 0.85  # the window's side is rounded up to whole pixels
    assert (x2 - x1) / (y2 - y1) == pytest.approx(width / height)
    ys, xs = (view[0] > 127).nonzero(as_tuple=True)
    np.testing.assert_allclose([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1], moved.xyxy[0], atol=2.5)


def test_views_have_the_side_that_is_asked_for(cache):
    classes = ObjectClasses.of(RECORDS, "category", True)
    item = CachedItems(cache, RegionItems(classes, None, 4, STILL, view=28))[0]
    assert item["pixel_values"].shape == (3, 28, 28)
    assert set(item["boxes"][:, 0].tolist()) == {0.0, 7.0}  # half of 0 and 14


def test_captions_of_a_view_name_what_it_shows(cache, tokenizer):
    still = CachedItems(cache, CaptionItems(tokenizer, 64, STILL, "visible"))
    assert len(still) == 2  # the record without regions is left out
    seen = {tokenizer.decode(still[0]["input_ids"][:-1]) for _ in range(60)}
    assert {"dog", "cup", "dog, cup", "cup, dog"} <= seen
    named = {part for caption in seen for part in caption.split(", ")}
    assert named == {"dog", "cup", '"to be or not to be"'}
    near = CachedItems(
        cache, CaptionItems(tokenizer, 64, AugmentConfig(1.0, 0.0, 0.0, zoom=1.0, zoom_max=1.05), "visible")
    )
    lengths = {len(tokenizer.decode(near[0]["input_ids"][:-1]).split(", ")) for _ in range(30)}
    assert lengths == {1}  # a window of 17 px holds one region of 12 px, and less than half of its neighbour


def test_tags_and_category_make_one_class():
    records = [
        Record(
            image="a.png",
            width=SIZE,
            height=SIZE,
            regions=[region(0, "star", tags=["red", "star"]), region(14, "star"), region(28, tags=["red"])],
        )
    ]
    classes = ObjectClasses.of(records, "tags", True)
    assert classes.names == ["red star", "star"]
    assert classes.labels(records[0]) == [0, 1, NO_CLASS]


def test_jitter_changes_light_alone():
    pixels = torch.randint(60, 190, (3, SIZE, SIZE), dtype=torch.uint8)
    view, _, _, _ = random_view(pixels, Boxes.empty(), AugmentConfig(1.0, 0.2, 0.2), np.random.default_rng(1))
    assert not torch.equal(view, pixels)
    assert torch.corrcoef(torch.stack([view.flatten().float(), pixels.flatten().float()]))[0, 1] > 0.999


@pytest.mark.parametrize(
    "bad", [{"min_scale": 0.0}, {"brightness": 1.0}, {"contrast": -0.1}, {"zoom": 1.1}, {"zoom_max": 0.9}]
)
def test_wrong_augmentations_are_refused(bad):
    with pytest.raises(UserError, match=next(iter(bad))):
        AugmentConfig(**bad)
