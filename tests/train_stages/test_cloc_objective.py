"""CLOC's losses on a small model, put together by hand from its outputs."""

import pytest
import torch
from transformers import CLIPTextConfig, CLIPVisionConfig, CLIPVisionModel, MLCDVisionConfig, MLCDVisionModel

from regiontower.train_stages.cloc_objective import ClocLossConfig, ClocObjective
from regiontower.train_stages.contrastive import contrastive_loss
from regiontower.vision_towers import ClocConfig, ClocModel, ClocVisionModel
from regiontower.vision_towers.errors import UserError

BOXES = torch.tensor([[[0.0, 0, 56, 56], [14, 14, 42, 42]], [[3, 40, 20, 56], [0, 0, 0, 0]], [[0, 0, 0, 0]] * 2])
REGIONS = torch.cat([BOXES[0], BOXES[1, :1]])


SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
TOWERS = {"rotary": (MLCDVisionModel, MLCDVisionConfig), "learned": (CLIPVisionModel, CLIPVisionConfig)}


def objective(region_pool: str = "prompter", positions: str = "rotary", **fields) -> ClocObjective:
    torch.manual_seed(0)
    kind, config = TOWERS[positions]
    vit = kind(config(**SIZES, image_size=56, patch_size=14))
    tower = ClocVisionModel.from_native(vit, projection_dim=16, region_pool=region_pool)
    text = CLIPTextConfig(
        vocab_size=20, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=8,
    )  # fmt: skip
    model = ClocModel(ClocConfig(vision_config=tower.config, text_config=text)).eval()
    return ClocObjective(model, ClocLossConfig(**fields))


def batch(with_regions: bool = True) -> dict:
    generator = torch.Generator().manual_seed(2)
    texts = torch.randint(4, 20, (3, 5), generator=generator)
    texts[2] = texts[0]  # the third region is called as the first one
    count = 3 if with_regions else 0
    return {
        "pixel_values": torch.randint(0, 256, (3, 3, 56, 56), generator=generator, dtype=torch.uint8),
        "input_ids": texts.flip(1),
        "attention_mask": torch.ones(3, 5, dtype=torch.long),
        "boxes": BOXES,
        "region_counts": torch.tensor([2, 1, 0] if with_regions else [0, 0, 0]),
        "region_input_ids": texts[:count],
        "region_attention_mask": torch.ones(count, 5, dtype=torch.long),
    }


@pytest.mark.parametrize("grounding", [True, False])
@pytest.mark.parametrize("same_above", [0.9, None])
def test_the_total_is_the_paper_s(grounding, same_above):
    made = objective(region_weight=0.5, grounding=grounding, same_above=same_above)
    inputs = batch()
    found = made(**inputs)
    outputs = made.model(**{**inputs, "pixel_values": made.norm(inputs["pixel_values"])})
    scale = made.model.logit_scale
    images = contrastive_loss(outputs.image_embeds, outputs.text_embeds, scale).loss
    regions = contrastive_loss(outputs.region_embeds, outputs.region_text_embeds, scale, same_above=same_above).loss
    boxes = sum(((a - b) / 56).square().sum() for a, b in zip(outputs.text_boxes, REGIONS, strict=True)) / (4 * 3)
    share = 2 / 3  # images with regions
    torch.testing.assert_close(found.loss, images + 0.5 * share * (regions + grounding * boxes))


@pytest.mark.parametrize("positions", TOWERS)
@pytest.mark.parametrize("region_pool", ["prompter", "roi_align"])
def test_every_parameter_gets_a_gradient_also_without_regions(region_pool, positions):
    for with_regions in (True, False):
        made = objective(region_pool, positions)
        made(**batch(with_regions)).loss.backward()
        without = {name for name, parameter in made.named_parameters() if parameter.grad is None}
        assert not without, with_regions
        learned = {name for name, parameter in made.named_parameters() if parameter.grad.any()}
        assert any("box_head" in name for name in learned) == with_regions


def test_the_filter_spares_regions_of_the_same_name():
    inputs = batch()
    assert objective(same_above=0.9)(**inputs).loss < objective(same_above=None)(**inputs).loss


@pytest.mark.parametrize(
    ("fields", "named"), [({"region_weight": -1.0}, "region_weight"), ({"same_above": 2.0}, "same")]
)
def test_wrong_settings_are_one_sentence(fields, named):
    with pytest.raises(UserError, match=named):
        ClocLossConfig(**fields)
