"""Regions and images against texts, with towers that have them."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from regiontower.eval.probe.classify import share
from regiontower.eval.probe.labels import object_labels
from regiontower.eval.probe.prompts import class_texts
from regiontower.eval.probe.reading import read_by_tokens, text_centres
from regiontower.eval.probe.regions import ProbeRegions, labelled_regions, reader
from regiontower.eval.probe.text_side import TextSide, open_with_texts
from regiontower.eval.probe.zero_shot import (
    all_captions,
    image_classes,
    image_retrieval,
    located,
    region_retrieval,
    zero_shot_classes,
)
from regiontower.train_stages.clip_objective import ClipConfig, ClipObjective
from regiontower.train_stages.conversations import region_words
from regiontower.train_stages.normalise import PixelNorm
from regiontower.train_stages.pretrain_heads import save_text_side
from regiontower.train_stages.region_labels import ObjectClasses
from regiontower.vision_towers import TowerSpec, UserError, describe_tower, tower_image_processor

NAMES = ["red square", "green square", "blue square"]


@pytest.fixture(scope="module")
def cache(squares):
    return squares(9, 4)


@pytest.fixture(scope="module")
def clip_folder(rice_tower, tiny_tokenizer, tmp_path_factory):
    """A finished run of the clip objective, as `pretrain` leaves it."""
    torch.manual_seed(2)
    sizes = ClipConfig(embed_dim=12, text_hidden=16, text_layers=1, text_heads=2, max_tokens=16)
    objective = ClipObjective(rice_tower, len(tiny_tokenizer), tiny_tokenizer.eos_token_id, sizes)
    folder = tmp_path_factory.mktemp("clip")
    rice_tower.save_pretrained(folder)
    tower_image_processor(rice_tower.config).save_pretrained(folder)
    save_text_side(objective, tiny_tokenizer, folder)
    return folder, objective


class OneHot:
    """A space in which a text is its own axis, and a region the axis of the colour it shows."""

    def __init__(self, wrong: int = 0):
        self.wrong = wrong  # so many of the first regions show another colour

    def side(self) -> TextSide:
        def texts(asked):
            return torch.tensor([[float(color in text) for color in ("red", "green", "blue")] for text in asked])

        return TextSide(texts=texts, images=lambda pixels: pixels, regions={"own": lambda rows: rows[:, :3]})

    def read(self, cache, rows, boxes, batch, progress):
        for row in rows:
            regions = cache.records[row].regions
            embeds = self.side().texts([region.tags[0] for region in regions])
            yield embeds.roll(1, dims=1) if row < self.wrong else embeds


def test_regions_get_the_name_they_are_nearest_to(cache):
    labels = object_labels(ObjectClasses(NAMES, "tags", True))
    space = OneHot(wrong=3)

    def first_of(cache, rows, boxes, batch, progress):  # the second square of each is a text
        return (embeds[:1] for embeds in space.read(cache, rows, boxes, batch, progress))

    found = zero_shot_classes(labelled_regions(first_of, cache, labels), NAMES, space.side(), "own")
    assert found.n == 9 and found.value == pytest.approx(6 / 9)


def test_retrieval_counts_a_hit_among_the_first_k(cache):
    side = OneHot().side()
    found = region_retrieval(OneHot().read, cache, side, "own")
    words = {region_words(region) for record in cache.records for region in record.regions}
    assert found["text_to_region_r1"].n == len(words) and found["region_to_text_r1"].n == 18
    # 'red square' and 'red square "red"' are the same to this space: one of the two is nearest, the other is second.
    assert found["region_to_text_r1"].value < 1 and found["region_to_text_r5"].value == 1
    assert found["text_to_region_r10"].value == 1
    worse = region_retrieval(OneHot(wrong=9).read, cache, side, "own")
    assert worse["region_to_text_r1"].value == 0 and worse["text_to_region_r1"].value == 0


@torch.inference_mode()
def test_a_clip_run_brings_its_texts(clip_folder, cache, rice_tower):
    folder, objective = clip_folder
    tower, side = open_with_texts(folder)
    assert side is not None and set(side.regions) == {"own", "value", "crops"} and side.locate is None
    pixels = torch.randn(2, 3, 56, 56)
    torch.testing.assert_close(side.images(pixels), objective.image_projection(rice_tower(pixels).pooler_output))
    ids = objective.text_tower  # the same words through the objective's own parts
    from regiontower.train_stages.region_labels import open_tokenizer
    from regiontower.vision_towers.text_tower import text_states

    tokenizer = open_tokenizer(folder / "text_tower")
    row = [*tokenizer("red square", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    states = text_states(ids, torch.tensor([row]), torch.ones(1, len(row), dtype=torch.long))
    torch.testing.assert_close(side.texts(["red square", "a much longer text"])[:1], objective.text_projection(states))
    found = image_retrieval(cache, side, describe_tower(tower.config), tower.device)
    assert found["image_to_text_r1"].n == 9 and found["text_to_image_r10"].value == 1  # nine images, ten places


@torch.inference_mode()
def test_image_retrieval_is_what_a_slow_search_finds(clip_folder, cache):
    tower, side = open_with_texts(clip_folder[0])
    spec = describe_tower(tower.config)
    pixels = PixelNorm(spec.image_mean, spec.image_std)(torch.from_numpy(np.array(cache.pixels)))
    captions = [record.captions[0] for record in cache.records]
    distinct = list(dict.fromkeys(captions))
    cosine = F.normalize(side.images(pixels), dim=-1) @ F.normalize(side.texts(distinct), dim=-1).T
    found = image_retrieval(cache, side, spec, tower.device)
    assert not [name for name in found if "all" in name]  # each image has one caption
    right = [distinct[row.argmax()] == caption for row, caption in zip(cosine, captions, strict=True)]
    assert found["image_to_text_r1"] == share(np.array(right), np.arange(9))
    back = [captions[column.argmax()] == text for column, text in zip(cosine.T, distinct, strict=True)]
    assert found["text_to_image_r1"].value == pytest.approx(np.mean(back))


@torch.inference_mode()
def test_retrieval_by_all_captions_is_what_a_slow_search_finds(clip_folder, cache):
    tower, side = open_with_texts(clip_folder[0])
    spec = describe_tower(tower.config)
    rng, words = np.random.default_rng(3), ["red", "star", "blue", "heart", "sign", "the", "in", "none"]
    said = [[" ".join(rng.choice(words, 3)) for _ in range(int(rng.integers(2, 6)))] for _ in range(9)]
    said[4][0] = said[2][1]  # two images with a caption in common
    records = [r.model_copy(update={"captions": own}) for r, own in zip(cache.records, said, strict=True)]
    part = replace(cache, records=[records[0].model_copy(update={"captions": []}), *records[1:]])
    found = image_retrieval(part, side, spec, tower.device)
    first = image_retrieval(
        replace(part, records=[r.model_copy(update={"captions": r.captions[:1]}) for r in part.records]),
        side, spec, tower.device,
    )  # fmt: skip
    assert {name: row for name, row in found.items() if "all" not in name} == first
    pixels = PixelNorm(spec.image_mean, spec.image_std)(torch.from_numpy(np.array(cache.pixels[1:])))
    images, every = F.normalize(side.images(pixels), dim=-1), sorted({text for own in said[1:] for text in own})
    texts = {text: F.normalize(side.texts([text])[0], dim=-1) for text in every}
    for k in (1, 5):
        there = [
            any(text in own for text in sorted(every, key=lambda t, i=image: -float(texts[t] @ i))[:k])
            for image, own in zip(images, said[1:], strict=True)
        ]
        back = [
            any(text in said[1:][i] for i in sorted(range(8), key=lambda i, t=texts[text]: -float(images[i] @ t))[:k])
            for own in said[1:]
            for text in own
        ]
        forth_share, back_share = found[f"image_to_text_all_r{k}"], found[f"text_to_image_all_r{k}"]
        assert forth_share.n == 8 and forth_share.value == pytest.approx(np.mean(there))
        assert back_share.n == sum(map(len, said[1:])) and back_share.value == pytest.approx(np.mean(back))
    assert found["text_to_image_all_r1"].value < 1


def test_one_of_an_images_captions_is_enough_and_each_of_them_asks():
    axes = {"a": [1.0, 0, 0], "b": [0.9, 0.1, 0], "c": [0, 1.0, 0], "d": [0, 0, 1.0]}
    side = TextSide(lambda asked: torch.tensor([axes[text] for text in asked]), {}, lambda pixels: pixels)
    images = F.normalize(torch.tensor([[0.8, 0.2, 0], [0, 0.6, 0.8]]), dim=-1)
    # The first image is nearest to its second caption; the second to d, which it has. Of the five that ask, "a" (twice,
    # by both) and "b" find the first image, c and d the second.
    found = all_captions(images, [["a", "b"], ["a", "c", "d"]], np.array([3, 7]), side)
    assert found["image_to_text_all_r1"].value == 1 and found["image_to_text_all_r1"].n == 2
    assert found["text_to_image_all_r1"].value == 1 and found["text_to_image_all_r1"].n == 5
    apart = all_captions(images, [["a", "c"], ["b", "d"]], np.array([3, 7]), side)
    assert apart["image_to_text_all_r1"].value == 0.5  # b is nearest to the first image, and is the other's
    assert apart["text_to_image_all_r1"].value == 0.5  # a and d


@torch.inference_mode()
def test_templates_are_averaged_for_regions_and_images(cache):
    said = {"x red": [1.0, 0, 0], "y red": [0, 1.0, 0], "red": [0, 0, 1.0], "x green": [0, 0, 1.0]}
    said |= {"y green": [0, 0, 1.0], "green": [1.0, 0.1, 0]}
    side = TextSide(
        lambda asked: torch.tensor([said.get(text, [0.0, 0, 0]) for text in asked]),
        {"own": lambda rows: rows},
        lambda pixels: torch.tensor([[0.6, 0.7, 0.1]]).expand(len(pixels), 3),
    )
    regions = ProbeRegions(np.array([[0.6, 0.7, 0.1]], np.float32), np.array([0]), np.array([0]))
    names, templates = ["red", "green"], ("x {}", "y {}")
    assert zero_shot_classes(regions, names, side, "own").value == 0
    assert zero_shot_classes(regions, names, side, "own", templates).value == 1
    torch.testing.assert_close(class_texts(side.texts, names, templates)[0], torch.tensor([0.5**0.5, 0.5**0.5, 0]))
    own = [["red"], ["red"], ["green"]]  # and all images look the same: as names green, by templates red
    records = [r.model_copy(update={"tags": tags}) for r, tags in zip(cache.records[:3], own, strict=True)]
    part = replace(cache, records=records, pixels=cache.pixels[:3])
    spec = TowerSpec(1, 1, 8, 56, 0, -1, "learned", False, "none", (0.0,) * 3, (1.0,) * 3)
    for given, value in ((None, 1 / 3), (templates, 2 / 3)):
        found = image_classes(part, side, spec, torch.device("cpu"), given)
        assert found["image_zero_shot_top1"].value == pytest.approx(value)


def test_images_are_classified_by_their_tags(cache):
    """A space in which an image is the colour of its number, and a text is its own axis."""
    colours = ("red", "green", "blue")
    said = [["red"], ["green", "much"], ["red"], [], ["green"], ["a", "blue"]]
    records = [r.model_copy(update={"tags": tags}) for r, tags in zip(cache.records[:6], said, strict=True)]
    part, spec = (
        replace(cache, records=records, pixels=cache.pixels[:6]),
        TowerSpec(1, 1, 8, 56, 0, -1, "learned", False, "none", (0.0,) * 3, (1.0,) * 3),
    )
    first = iter(range(6))

    def images(pixels):
        return torch.eye(3)[[(0, 1, 2, 1, 2)[next(first)] for _ in pixels]]  # of the five with tags: red, green, ...

    side = TextSide(
        texts=lambda asked: torch.tensor([[float(text == color) for color in colours] for text in asked]) + 1e-3,
        images=images,
        regions={},
    )
    found = image_classes(part, side, spec, torch.device("cpu"))
    assert found["image_zero_shot_top1"].n == 5
    # red and green are right, the third (red, seen as blue) is wrong, the fourth (green) right, the last blue.
    assert found["image_zero_shot_top1"].value == pytest.approx(4 / 5)
    assert found["image_zero_shot_top5"].value == 1  # five tags in all
    assert image_classes(cache, side, spec, torch.device("cpu")) == {}


@torch.inference_mode()
def test_a_cloc_run_brings_texts_and_prompts(cloc_folder, cache):
    tower, side = open_with_texts(cloc_folder)
    assert side is not None and set(side.regions) == {"own"}
    texts = side.texts(NAMES)
    assert texts.shape == (3, 24)
    boxes = side.locate(torch.randn(1, 3, 56, 56), texts)
    assert boxes.shape == (3, 4)
    spec = describe_tower(tower.config)
    found = located(cache, side, spec, tower.device)
    assert found.n == 18 and found.value < 0.5  # it has learned nothing
    truth = iter(cache.records)

    def tell(pixels, texts):
        return torch.tensor([region.box_xyxy for region in next(truth).regions]).flip(-1) * torch.tensor([0.0])

    empty = located(cache, TextSide(side.texts, {}, side.images, tell), spec, tower.device)
    assert empty.value == 0  # boxes without area are no boxes
    truth = iter(cache.records)

    def know(pixels, texts):
        return torch.tensor([region.box_xyxy for region in next(truth).regions])

    assert located(cache, TextSide(side.texts, {}, side.images, know), spec, tower.device).value == 1


def test_a_tower_without_texts_has_none(rice_tower, tmp_path):
    rice_tower.save_pretrained(tmp_path)
    assert open_with_texts(tmp_path)[1] is None
    assert text_centres(tmp_path) is None


def test_words_are_read_by_their_token_classes(tiny_tokenizer, rice_tower, cache):
    words = ["red", "green", "blue"]
    torch.manual_seed(0)
    centres = F.normalize(torch.randn(len(tiny_tokenizer), 32), dim=-1)
    sets = [sorted(set(tiny_tokenizer(word, add_special_tokens=False)["input_ids"])) for word in words]
    features = torch.stack([centres[ids].mean(dim=0) for ids in sets])
    asked = ProbeRegions(features.numpy() * 7, np.arange(3), np.arange(3))
    assert read_by_tokens(asked, words, centres, tiny_tokenizer).value == 1
    assert read_by_tokens(asked, words[::-1], centres, tiny_tokenizer).value == pytest.approx(1 / 3)
    with pytest.raises(UserError, match="text centres"):
        read_by_tokens(asked, words, centres[1:], tiny_tokenizer)
    assert reader(rice_tower, "own")  # the features above stand for these


def test_a_word_without_tokens_is_no_answer():
    inner = Tokenizer(models.WordLevel({"<unknown>": 0, "red": 1, "blue": 2}, "<unknown>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unknown>")
    centres = torch.eye(3)
    asked = ProbeRegions(np.array([[0, -0.2, -0.1]], np.float32), np.array([2]), np.array([0]))
    assert read_by_tokens(asked, ["lilac", "red", "blue"], centres, tokenizer).value == 1
