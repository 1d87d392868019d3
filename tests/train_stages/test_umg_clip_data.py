"""The items of UMG-CLIP: captions, tags, texts and masks belong to the regions and the view that they stand for."""

import numpy as np
import pytest
import torch
from PIL import Image

from regiontower.mllm.boxes import ImageFrame
from regiontower.train_stages.augment import AugmentConfig
from regiontower.train_stages.mask_coverage import patch_coverage
from regiontower.train_stages.masks import encode_mask
from regiontower.train_stages.pixels import PixelCache
from regiontower.train_stages.pretrain_data import CaptionTokens
from regiontower.train_stages.pretrain_items import CachedItems
from regiontower.train_stages.record_io import RecordSet
from regiontower.train_stages.records import Mask, Record, Region
from regiontower.train_stages.tag_bank import TagBank
from regiontower.train_stages.umg_clip_data import TaggedRegionItems
from regiontower.vision_towers.errors import UserError

WIDTH, HEIGHT, SIDE, PATCH = 80, 40, 56, 14
STILL = AugmentConfig(1.0, 0.0, 0.0)
NEAR = AugmentConfig(1.0, 0.0, 0.0, zoom=1.0, zoom_max=1.05)  # a window as large as one region


def disc(box) -> Mask:
    x1, y1, x2, y2 = box
    y, x = np.mgrid[:HEIGHT, :WIDTH] + 0.5
    inside = ((x - (x1 + x2) / 2) / (x2 - x1)) ** 2 + ((y - (y1 + y2) / 2) / (y2 - y1)) ** 2 <= 0.25
    return Mask(**encode_mask(inside))


CUP, DOG, SIGN = (0, 4, 20, 20), (40, 10, 70, 38), (20, 0, 36, 10)
RECORDS = [
    Record(
        image="0.png", width=WIDTH, height=HEIGHT, captions=["a table"], tags=["Table", "indoors"],
        regions=[
            Region(box_xyxy=CUP, category="cup", tags=["red", "Cup"], captions=["a cup with a handle"], mask=disc(CUP)),
            Region(box_xyxy=DOG, category="dog", mask=disc(DOG)),
            Region(box_xyxy=SIGN, ocr="stop"),
            Region(box_xyxy=(1, 1, 5, 5)),  # nothing is known of it
        ],
    ),
    Record(image="1.png", width=WIDTH, height=HEIGHT, regions=[Region(box_xyxy=CUP, category="cup")]),
    Record(image="2.png", width=WIDTH, height=HEIGHT, tags=["sky"]),
    Record(image="3.png", width=WIDTH, height=HEIGHT, regions=[Region(box_xyxy=CUP)]),
]  # fmt: skip
BANK = TagBank.of(RECORDS)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    for number in range(len(RECORDS)):
        Image.new("RGB", (WIDTH, HEIGHT), (number, number, number)).save(root / f"{number}.png")
    return PixelCache.build(RecordSet(root, root, RECORDS), SIDE, progress=False)


@pytest.fixture
def make(cache, tiny_tokenizer):
    def build(augment=STILL, count=4, **options) -> CachedItems:
        tokens = CaptionTokens(tiny_tokenizer, 32)
        return CachedItems(cache, TaggedRegionItems(tokens, BANK, PATCH, count, augment, **options))

    return build


def names(ids) -> list[str]:
    return [BANK.names[i] for i in ids if i >= 0]


def test_two_spellings_are_one_tag():
    assert BANK.names == ("cup", "dog", "indoors", "red", "sky", "table")
    assert BANK.ids(["Red", "CUP", "red", "unicorn"]) == [0, 3]


def test_an_item_says_what_the_record_says(make, tiny_tokenizer):
    dataset = make()
    assert len(dataset) == 3  # the last record has nothing to say
    regions = [region for image in dataset.known for region in image.regions]
    assert (len(regions), sum(region.mask is not None for region in regions)) == (4, 2)
    texts, captions = set(), set()
    expected = {"cup": ["cup", "red"], "dog": ["dog"], "sign": []}
    for _ in range(40):
        item = dataset[0]
        captions.add(tiny_tokenizer.decode(item["input_ids"][:-1]))
        assert names(item["image_tags"]) == ["cup", "dog", "indoors", "red", "table"]
        for box, ids, tags in zip(item["boxes"], item["region_input_ids"], item["region_tags"], strict=True):
            which = {0.0: "cup", 28.0: "dog", 14.0: "sign"}[box[0].item()]
            texts.add((which, tiny_tokenizer.decode(ids[:-1])))
            assert names(tags) == expected[which]
    assert captions == {"a table"}
    assert texts == {
        ("cup", "red Cup cup"), ("cup", "a cup with a handle"), ("dog", "dog"), ("sign", '"stop"')
    }  # fmt: skip
    assert names(make()[1]["image_tags"]) == ["cup"]  # of its regions alone
    assert tiny_tokenizer.decode(make()[1]["input_ids"][:-1]) == "cup"  # without a caption: what is in view
    assert make()[2]["input_ids"] is None


def test_a_zoomed_view_takes_tags_and_caption_of_what_it_shows(make, tiny_tokenizer):
    shown = set()
    for _ in range(60):
        item = make(NEAR)[0]
        caption = tiny_tokenizer.decode(item["input_ids"][:-1])
        # A dog fills its window; the cup's may hold half of the sign, which has no tags.
        shown.add((caption in ("dog",), tuple(names(item["image_tags"]))))
    assert (True, ("dog",)) in shown and (False, ("cup", "red")) in shown
    assert not any("table" in tags for caption, tags in shown if tags != ("indoors", "table"))
    assert names(make(NEAR)[2]["image_tags"]) == ["sky"]  # the record's, where no region says more


@pytest.mark.parametrize("augment", [STILL, NEAR, AugmentConfig(0.6, 0.0, 0.0)])
def test_masks_follow_the_boxes_into_the_view(make, augment):
    """A disc fills pi/4 of its box: wherever the view puts the box, and cut off as the box is."""
    for _ in range(30):
        item = make(augment, view=112)[0]
        assert item["masks"].shape == (len(item["boxes"]), 8, 8)
        for box, shares, tags in zip(item["boxes"], item["masks"], item["region_tags"], strict=True):
            if not tags:
                assert not shares.any()  # the sign has no mask
                continue
            x1, y1, x2, y2 = box.tolist()
            frame = ImageFrame.identity((112, 112))
            inside = np.zeros((112, 112), bool)
            inside[round(y1) : round(y2), round(x1) : round(x2)] = True
            of_box = torch.from_numpy(patch_coverage(Mask(**encode_mask(inside)), frame, PATCH))
            assert (shares <= of_box + 0.3).all()  # boxes here are rounded to pixels
            assert 0.6 < shares.sum() / of_box.sum() < 0.95


def test_a_mask_in_a_letterboxed_view_is_exact(make):
    item = make()[0]
    row = next(i for i, tags in enumerate(item["region_tags"]) if "dog" in names(tags))
    expected = patch_coverage(disc(DOG), ImageFrame.letterbox((WIDTH, HEIGHT), SIDE), PATCH)
    np.testing.assert_allclose(item["masks"][row].numpy(), expected, atol=1e-6)


def test_a_batch_is_padded_and_says_which_images_have_a_caption(make):
    torch.manual_seed(3)
    dataset = make(count=2)
    items = [dataset[i] for i in (2, 0, 1)]
    batch = dataset.maker.collate(items)
    assert batch["captioned"].tolist() == [False, True, True] and len(batch["input_ids"]) == 2
    assert batch["region_counts"].tolist() == [0, 2, 1] and len(batch["region_input_ids"]) == 3
    assert batch["boxes"].shape == (3, 2, 4) and batch["masks"].shape == (3, 2, 4, 4)
    assert batch["region_tags"].shape[:2] == (3, 2)
    for row, item in enumerate(items):
        count = len(item["boxes"])
        assert torch.equal(batch["boxes"][row, :count], item["boxes"]) and not batch["boxes"][row, count:].any()
        assert torch.equal(batch["masks"][row, :count], item["masks"]) and not batch["masks"][row, count:].any()
        assert [names(ids) for ids in batch["region_tags"][row, :count]] == [names(ids) for ids in item["region_tags"]]
        assert (batch["region_tags"][row, count:] == -1).all()
        assert names(batch["image_tags"][row]) == names(item["image_tags"])
    torch.manual_seed(3)
    assert torch.equal(dataset.maker.collate(items)["tag_seed"], batch["tag_seed"])
    assert not torch.equal(dataset.maker.collate(items)["tag_seed"], batch["tag_seed"])


def test_nothing_to_learn_from_is_one_sentence(cache, tiny_tokenizer):
    silent = PixelCache(cache.pixels[3:], cache.frames[3:], cache.records[3:], [])
    with pytest.raises(UserError, match="no record has captions, tags or regions with words"):
        CachedItems(silent, TaggedRegionItems(CaptionTokens(tiny_tokenizer, 32), BANK, PATCH, 4, STILL))


def test_texts_framed_and_padded_as_a_pair_s_tokenizer_does():
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = {word: number for number, word in enumerate(["<pad>", "<begin>", "<end>", "a", "red", "cup"])}
    inner = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        "<begin> $A <end>", special_tokens=[("<begin>", 1), ("<end>", 2)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<end>")
    framed = CaptionTokens(tokenizer, 4, framed=True, length=6)
    assert framed("red cup") == [1, 4, 5, 2] == tokenizer("red cup")["input_ids"]
    assert framed("a red cup") == [1, 3, 4, 2]  # cut, and still ended
    ids, mask = framed.pad([framed("cup"), framed("a cup")])
    assert ids.tolist() == [[1, 5, 2, 0, 0, 0], [1, 3, 5, 2, 0, 0]] and mask.sum(1).tolist() == [3, 4]
    assert ids[:1].equal(torch.tensor([tokenizer("cup", padding="max_length", max_length=6)["input_ids"]]))
    assert framed.pad([])[0].shape == (0, 6)
    assert CaptionTokens(tokenizer, 4)("red cup") == [4, 5, 2]
