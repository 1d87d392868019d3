"""UMG-CLIP's losses on a small model, put together by hand from its outputs, alone and in two processes."""

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel
from transformers import CLIPTextConfig, CLIPVisionConfig, CLIPVisionModel

from regiontower.train_stages.contrastive import contrastive_loss
from regiontower.train_stages.tag_loss import sampled_tags, tag_loss, tags_in_sample
from regiontower.train_stages.umg_clip_objective import UmgClipLossConfig, UmgClipObjective
from regiontower.vision_towers import UmgClipConfig, UmgClipModel, UmgClipVisionModel
from regiontower.vision_towers.errors import UserError

BANK, SEED = 12, 5
SPLITS = {1: [0, 4], 2: [0, 2, 4], 3: [0, 2, 3, 4]}  # images of each process
COUNTS = torch.tensor([2, 1, 0, 2])
CAPTIONED = torch.tensor([True, True, False, True])
# Of the five regions the fourth has no tags, the third no mask.
IMAGE_TAGS = torch.tensor([[0, 3], [3, -1], [-1, -1], [5, 6]])
REGION_TAGS = torch.tensor([[[0, -1], [3, 2]], [[3, -1], [-1, -1]], [[-1, -1]] * 2, [[-1, -1], [5, 2]]])
MASKED = torch.tensor([[1.0, 1], [0, 0], [0, 0], [1, 1]])


def objective(**fields) -> UmgClipObjective:
    torch.manual_seed(0)
    vit = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14
    )
    tower = UmgClipVisionModel.from_native(CLIPVisionModel(vit))
    text = CLIPTextConfig(
        vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=8, bos_token_id=0, eos_token_id=3,
    )  # fmt: skip
    model = UmgClipModel(UmgClipConfig(vision_config=tower.config, text_config=text, projection_dim=16))
    tags = torch.stack([torch.arange(4, 4 + BANK), torch.full((BANK,), 3)], dim=1)
    return UmgClipObjective(model.eval(), tags, torch.ones_like(tags), UmgClipLossConfig(**fields))


def batch(images: slice = slice(None)) -> dict[str, torch.Tensor]:
    """Those of the four images."""
    generator = torch.Generator().manual_seed(2)
    corners = torch.rand(4, 2, 2, 2, generator=generator) * 28
    boxes = torch.cat([corners[:, :, 0], corners[:, :, 0] + 4 + corners[:, :, 1]], dim=-1)
    texts = torch.randint(4, 40, (8, 5), generator=generator)
    texts[:, -1] = 3
    texts[6] = texts[4]  # two regions called the same
    places = torch.arange(4).repeat_interleave(COUNTS)
    of_regions = texts[3:][(places >= (images.start or 0)) & (places < (4 if images.stop is None else images.stop))]
    captions = texts[:3][(CAPTIONED.cumsum(0) - 1)[images][CAPTIONED[images]]]
    return {
        "pixel_values": torch.randint(0, 256, (4, 3, 56, 56), generator=generator, dtype=torch.uint8)[images],
        "input_ids": captions,
        "attention_mask": torch.ones_like(captions),
        "captioned": CAPTIONED[images],
        "image_tags": IMAGE_TAGS[images],
        "boxes": boxes[images],
        "masks": (torch.rand(4, 2, 4, 4, generator=generator) * MASKED[..., None, None])[images],
        "region_counts": COUNTS[images],
        "region_input_ids": of_regions,
        "region_attention_mask": torch.ones_like(of_regions),
        "region_tags": REGION_TAGS[images],
        "tag_seed": torch.tensor(SEED + (images.start or 0)),
    }


WEIGHTS = {
    "image_caption": 0.7, "image_tag": 0.2, "region_caption": 0.3, "region_tag": 0.4, "pixel_caption": 0.5,
    "pixel_tag": 0.6,
}  # fmt: skip


@pytest.mark.parametrize("same_above", [0.95, None])
def test_the_total_is_the_sum_of_six(same_above):
    made, inputs = objective(**WEIGHTS, same_above=same_above, tag_negatives=4), batch()
    model, pixels = made.model, made.norm(inputs["pixel_values"])
    images, boxes = model.encode_images(pixels), model.encode_regions(pixels, inputs["boxes"], COUNTS)
    pooled = model.encode_masks(pixels, inputs["masks"], COUNTS)
    captions = model.encode_texts(inputs["input_ids"], inputs["attention_mask"])
    texts = model.encode_texts(inputs["region_input_ids"], inputs["region_attention_mask"])
    real = [(0, 0), (0, 1), (1, 0), (3, 0), (3, 1)]
    with_mask = [(0, 0), (0, 1), (3, 0), (3, 1)]

    def rows(embeds, places):
        return torch.stack([embeds[place] for place in places])

    def captions_loss(a, b, scale):
        return contrastive_loss(a, b, scale, same_above=same_above).loss

    sample = sampled_tags(torch.tensor([0, 2, 3, 5, 6]), BANK, 4, torch.tensor(SEED))
    assert len(sample) == 9
    names = model.encode_texts(made.tag_input_ids[sample], made.tag_attention_mask[sample])

    def tags_loss(embeds, tags):
        own = tags_in_sample(tags, sample, BANK)
        return tag_loss(embeds, names, own, model.tag_logit_scale, model.tag_logit_bias).loss

    parts = {
        "image_caption": captions_loss(images[[0, 1, 3]], captions, model.logit_scale),
        "image_tag": tags_loss(images, IMAGE_TAGS),
        "region_caption": captions_loss(rows(boxes, real), texts, model.region_logit_scale),
        "region_tag": tags_loss(rows(boxes, real), rows(REGION_TAGS, real)),
        "pixel_caption": captions_loss(rows(pooled, with_mask), texts[[0, 1, 3, 4]], model.region_logit_scale),
        "pixel_tag": tags_loss(rows(pooled, with_mask), rows(REGION_TAGS, with_mask)),
    }
    assert all(part > 0 for part in parts.values())
    found = made(**inputs)
    torch.testing.assert_close(found.loss, sum(WEIGHTS[name] * part for name, part in parts.items()))
    levels = {"image", "region", "pixel"}
    assert set(found.metrics) == {f"{level}_{what}_top1" for level in levels for what in ("to_text", "tag")}


def without(inputs: dict, *levels: str) -> dict:
    """The batch with nothing to say about those levels."""
    changed = dict(inputs)
    if "pixel" in levels:
        changed["masks"] = torch.zeros_like(inputs["masks"])
    if "region" in levels:
        changed |= {name: inputs[name][:0] for name in ("region_input_ids", "region_attention_mask")}
        changed["region_counts"] = torch.zeros_like(COUNTS)
    if "image" in levels:
        changed |= {name: inputs[name][:0] for name in ("input_ids", "attention_mask")}
        changed["captioned"] = torch.zeros_like(CAPTIONED)
        changed["image_tags"] = torch.full_like(IMAGE_TAGS, -1)
    if "tags" in levels:
        changed["image_tags"] = torch.full_like(IMAGE_TAGS, -1)
        changed["region_tags"] = torch.full_like(REGION_TAGS, -1)
    return changed


@pytest.mark.parametrize(
    "levels", [(), ("pixel",), ("region", "pixel"), ("image",), ("tags",), ("image", "region", "pixel", "tags")]
)
def test_a_level_that_is_absent_is_exactly_0_and_every_parameter_has_a_gradient(levels):
    inputs = without(batch(), *levels)
    made = objective()
    found = made(**inputs)
    found.loss.backward()
    assert not {name for name, weight in made.named_parameters() if weight.grad is None}
    assert not any(name.startswith(level) for level in levels for name in found.metrics)
    kept = {name: 0.0 for name in WEIGHTS if name.split("_")[0] in levels}
    if "tags" in levels:
        kept |= {name: 0.0 for name in WEIGHTS if name.endswith("tag")}
    if len(kept) == len(WEIGHTS):
        assert found.loss == 0
    else:
        torch.testing.assert_close(found.loss, objective(**kept)(**inputs).loss, rtol=0, atol=0)


def work(rank, processes):
    """Loss and gradients under DDP. The second of three processes has the third image alone, of which nothing is said;
    the draw's seed is another in each process, and the first one's counts."""
    made = objective(**WEIGHTS, tag_negatives=4)
    model = DistributedDataParallel(made) if processes > 1 else made
    images = slice(*SPLITS[processes][rank : rank + 2])
    found = model(**batch(images))
    found.loss.backward()
    return found.loss.detach(), {name: weight.grad for name, weight in made.named_parameters()}


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_equal_one(in_processes, processes):
    loss, gradients = work(0, 1)
    found = in_processes(processes, work, processes)
    torch.testing.assert_close(sum(row[0] for row in found) / processes, loss)
    for _, mine in found:  # DDP has averaged them
        for name, expected in gradients.items():
            torch.testing.assert_close(mine[name], expected, msg=lambda text, n=name: f"{n}: {text}")
    assert all(gradient.any() for gradient in gradients.values())


def test_a_run_without_tags():
    made = objective()
    made.tag_input_ids, made.tag_attention_mask = made.tag_input_ids[:0], made.tag_attention_mask[:0]
    found = made(**without(batch(), "tags"))
    found.loss.backward()
    assert found.loss > 0 and not any("tag" in name for name in found.metrics)
    assert all(weight.grad is not None for weight in made.parameters())


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"pixel_tag": -1.0}, "pixel_tag"),
        ({"same_above": 2.0}, "same_above"),
        ({"tag_negatives": -1}, "tag_negatives"),
        (dict.fromkeys(WEIGHTS, 0.0), "every weight"),
    ],
)
def test_wrong_settings_are_one_sentence(fields, named):
    with pytest.raises(UserError, match=named):
        UmgClipLossConfig(**fields)
