"""CLOC as a whole: two towers, one space, and what the losses need from one pass."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, CLIPTextConfig

from regiontower.vision_towers import ClocConfig, ClocModel, ClocVisionModel, UserError, load_cloc, load_tower

BOXES = torch.tensor([[[0.0, 0, 56, 56], [14, 14, 42, 42]], [[3, 40, 20, 56], [0, 0, 0, 0]], [[0, 0, 0, 0]] * 2])
COUNTS = torch.tensor([2, 1, 0])  # the last image has no region


@pytest.fixture
def model(native) -> ClocModel:
    tower = ClocVisionModel.from_native(native("mlcd"), projection_dim=24)
    text = CLIPTextConfig(
        vocab_size=20, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=8, eos_token_id=3,
    )  # fmt: skip
    made = ClocModel(ClocConfig(vision_config=tower.config, text_config=text))
    made.vision_tower.load_state_dict(tower.state_dict())
    return made.eval()


def batch() -> dict:
    generator = torch.Generator().manual_seed(2)
    texts = torch.randint(4, 20, (3, 5), generator=generator)
    return {
        "pixel_values": torch.randn(3, 3, 56, 56, generator=generator),
        "input_ids": texts,
        "attention_mask": (torch.arange(5)[None] < torch.tensor([5, 3, 2])[:, None]).long(),
        "boxes": BOXES,
        "region_counts": COUNTS,
        "region_input_ids": texts[:, :4],
        "region_attention_mask": torch.ones(3, 4, dtype=torch.long),
    }


@torch.no_grad()
def test_one_pass_gives_what_single_questions_give(model):
    inputs = batch()
    output = model(**inputs)
    pixels = inputs["pixel_values"]
    texts = model.encode_texts(inputs["region_input_ids"], inputs["region_attention_mask"])
    torch.testing.assert_close(output.region_text_embeds, texts)
    torch.testing.assert_close(output.image_embeds, model.encode_images(pixels))
    torch.testing.assert_close(output.text_embeds, model.encode_texts(inputs["input_ids"], inputs["attention_mask"]))
    regions = model.encode_regions(pixels, BOXES, COUNTS)
    torch.testing.assert_close(output.region_embeds, torch.cat([regions[0], regions[1, :1]]))
    assert not regions[2].any()
    boxes = torch.cat([model.locate(pixels[:1], texts[None, :2])[0], model.locate(pixels[1:2], texts[None, 2:])[0]])
    torch.testing.assert_close(output.text_boxes, boxes)


@torch.no_grad()
def test_what_stands_after_the_end_of_a_text_does_not_count(model):
    ids, mask = torch.tensor([[7, 8, 3, 0, 0]]), torch.tensor([[1, 1, 1, 0, 0]])
    other = torch.tensor([[7, 8, 3, 9, 9]])
    torch.testing.assert_close(model.encode_texts(ids, mask), model.encode_texts(other, mask))
    torch.testing.assert_close(model.encode_texts(ids, mask), model.encode_texts(ids[:, :3], mask[:, :3]))


@torch.no_grad()
def test_a_batch_without_regions(model):
    inputs = batch() | {"region_counts": torch.zeros(3, dtype=torch.long)}
    inputs["region_input_ids"] = inputs["region_input_ids"][:0]
    inputs["region_attention_mask"] = inputs["region_attention_mask"][:0]
    output = model(**inputs)
    assert output.region_embeds.shape == output.region_text_embeds.shape == (0, 24)
    assert output.text_boxes.shape == (0, 4) and output.image_embeds.shape == (3, 24)


@torch.no_grad()
def test_save_and_open_whole_or_the_tower_alone(model, tmp_path):
    expected = model(**batch())
    model.save_pretrained(tmp_path)
    for opened in (ClocModel.from_pretrained(tmp_path), AutoModel.from_pretrained(tmp_path)):
        for mine, theirs in zip(opened(**batch()).values(), expected.values(), strict=True):
            assert torch.equal(mine, theirs)
    tower = load_tower(tmp_path)
    assert isinstance(tower, ClocVisionModel)
    mine = tower(batch()["pixel_values"], BOXES, COUNTS).region_embeds
    assert torch.equal(mine, model.vision_tower(batch()["pixel_values"], BOXES, COUNTS).region_embeds)


def test_what_is_no_whole_cloc_is_refused(model, native, tmp_path):
    model.save_pretrained(tmp_path / "cloc")
    found = load_cloc(tmp_path / "cloc", dtype=torch.float64)
    assert found.dtype == torch.float64 and not found.training
    native("mlcd").save_pretrained(tmp_path / "vit")
    model.vision_tower.save_pretrained(tmp_path / "tower")
    refused = {
        "vit": "mlcd_vision_model; a cloc is needed",
        "tower": "cloc_vision_model; a cloc",
        "none": "no model can",
    }
    for name, sentence in refused.items():
        with pytest.raises(UserError, match=sentence):
            load_cloc(tmp_path / name)
    weights = load_file(tmp_path / "cloc" / "model.safetensors")
    del weights["text_projection.weight"]
    save_file(weights, tmp_path / "cloc" / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="lacks 1 tensors of a cloc"):
        load_cloc(tmp_path / "cloc")


def test_as_many_texts_as_regions(model):
    with pytest.raises(UserError, match="3 regions have 2 texts"):
        model(**batch() | {"region_input_ids": batch()["region_input_ids"][:2]})
