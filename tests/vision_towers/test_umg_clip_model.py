"""UMG-CLIP as a whole: native pairs lifted without a change, and boxes, masks and patches in the space of the texts."""

import pytest
import torch
from transformers import AutoModel, CLIPTextConfig

from regiontower.vision_towers import (
    UmgClipConfig,
    UmgClipModel,
    UmgClipVisionModel,
    UserError,
    load_tower,
    load_umg_clip,
)

BOXES = torch.tensor([[[0.0, 0, 56, 56], [14, 14, 42, 42]], [[3, 40, 20, 56], [0, 0, 0, 0]], [[0, 0, 0, 0]] * 2])
COUNTS = torch.tensor([2, 1, 0])  # the last image has no region
KINDS = ["clip", "siglip", "mlcd"]


@pytest.fixture
def build(native, native_pair):
    """`build(kind)`: a lifted pair, or an MLCD beside a new text tower."""

    def make(kind: str) -> UmgClipModel:
        if kind != "mlcd":
            return UmgClipModel.from_pair(native_pair(kind))
        tower = UmgClipVisionModel.from_native(native("mlcd"))
        text = CLIPTextConfig(
            vocab_size=20, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=8, bos_token_id=0, eos_token_id=3,
        )  # fmt: skip
        made = UmgClipModel(UmgClipConfig(vision_config=tower.config, text_config=text, projection_dim=24))
        made.vision_tower.load_state_dict(tower.state_dict())
        return made.eval()

    return make


def images() -> torch.Tensor:
    return torch.randn(3, 3, 56, 56, generator=torch.Generator().manual_seed(2))


def masks() -> torch.Tensor:
    shares = torch.rand(3, 2, 4, 4, generator=torch.Generator().manual_seed(3))
    shares[0, 0] = 0.0  # a region without a mask
    shares[0, 1, :2] = 0.0
    return shares


def texts(length: int | None) -> dict[str, torch.Tensor]:
    """Three texts that end in the end token, padded to the longest or to `length`."""
    ids = torch.ones(3, length or 5, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, words in enumerate(([7, 8, 9, 5], [4, 19], [6])):
        ids[row, : len(words) + 1] = torch.tensor([*words, 3])
        mask[row, : len(words) + 1] = 1
    return {"input_ids": ids, "attention_mask": mask}


def batch(length: int | None) -> dict[str, torch.Tensor]:
    given = texts(length)
    return {
        "pixel_values": images(),
        **given,
        "boxes": BOXES,
        "masks": masks(),
        "region_counts": COUNTS,
        **{f"region_{name}": value for name, value in given.items()},  # of three regions
        **{f"tag_{name}": value[1:] for name, value in given.items()},
    }


@pytest.mark.parametrize("kind", ["clip", "siglip"])
@torch.no_grad()
def test_a_lifted_pair_is_the_pair(native_pair, kind):
    pair = native_pair(kind)
    model = UmgClipModel.from_pair(native_pair(kind))
    assert torch.equal(model.encode_images(images()), pair.get_image_features(images()).pooler_output)
    given = texts(model.text_length)
    mask = given["attention_mask"] if kind == "clip" else None  # SigLIP is given none
    expected = pair.get_text_features(given["input_ids"], mask).pooler_output
    torch.testing.assert_close(model.encode_texts(**given), expected)
    scales = (model.logit_scale, model.region_logit_scale)
    assert all(scale.shape == (1,) and scale == pair.logit_scale for scale in scales)
    if kind == "siglip":
        assert (model.tag_logit_scale, model.tag_logit_bias) == (pair.logit_scale, pair.logit_bias)
    parts = (model, model.text_tower, model.vision_tower, model.vision_tower.tower)
    assert all(part.config._attn_implementation == "sdpa" and not part.training for part in parts)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_mask_is_the_mean_of_its_patches(build, kind):
    model, shares = build(kind), masks()
    dense = model.dense_embeddings(images())
    assert dense.shape == (3, 4, 4, model.encode_images(images()).shape[-1])
    found = model.encode_masks(images(), shares)
    weights = shares[0, 1] / shares[0, 1].sum()
    expected = sum(weights[i, j] * dense[0, i, j] for i in range(4) for j in range(4))
    torch.testing.assert_close(found[0, 1], expected)
    assert not found[0, 0].any()  # nothing is covered
    whole = model.encode_masks(images(), torch.ones(3, 1, 4, 4))
    torch.testing.assert_close(whole[:, 0], dense.mean((1, 2)))
    assert not model.encode_masks(images(), shares, COUNTS)[2].any()


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_one_pass_gives_what_single_questions_give(build, kind):
    model = build(kind)
    inputs = batch(model.text_length)
    output = model(**inputs)
    regions = model.encode_regions(images(), BOXES, COUNTS)
    pooled = model.encode_masks(images(), masks(), COUNTS)
    expected = {
        "image_embeds": model.encode_images(images()),
        "region_embeds": torch.cat([regions[0], regions[1, :1]]),
        "mask_embeds": torch.cat([pooled[0], pooled[1, :1]]),
        "text_embeds": model.encode_texts(**texts(model.text_length)),
    }
    for name, value in expected.items():
        torch.testing.assert_close(output[name], value)
    torch.testing.assert_close(output.tag_embeds, output.text_embeds[1:])
    torch.testing.assert_close(output.region_text_embeds, output.text_embeds)


@pytest.mark.parametrize("kind", KINDS)
def test_without_texts_and_regions_every_part_still_takes_part(build, kind):
    model = build(kind).requires_grad_(True)
    none = {name: value[:0] for name, value in batch(model.text_length).items() if name.endswith(("ids", "mask"))}
    output = model(**batch(model.text_length) | none | {"region_counts": torch.zeros(3, dtype=torch.long)})
    assert len(output.text_embeds) == len(output.region_embeds) == len(output.mask_embeds) == 0
    sum(value.sum() for value in output.values()).backward()
    scales = {"logit_scale", "region_logit_scale", "tag_logit_scale", "tag_logit_bias"}  # the losses' own
    assert {name for name, weight in model.named_parameters() if weight.grad is None} == scales


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_save_and_open_whole_or_the_tower_alone(build, tmp_path, kind):
    model = build(kind)
    expected = model(**batch(model.text_length))
    model.save_pretrained(tmp_path)
    for opened in (load_umg_clip(tmp_path), AutoModel.from_pretrained(tmp_path)):
        for mine, theirs in zip(opened(**batch(model.text_length)).values(), expected.values(), strict=True):
            assert torch.equal(mine, theirs)
        assert all(torch.equal(value, opened.state_dict()[name]) for name, value in model.state_dict().items())
    tower = load_tower(tmp_path)
    assert isinstance(tower, UmgClipVisionModel)
    assert torch.equal(tower(images(), BOXES).region_embeds, model.vision_tower(images(), BOXES).region_embeds)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
@torch.no_grad()
def test_a_saved_pair_opens_lifted(native, native_pair, tmp_path, kind):
    pair = native_pair(kind)
    pair.save_pretrained(tmp_path / "pair")
    model = load_umg_clip(tmp_path / "pair", roi_size=2)
    assert model.config.vision_config.roi_size == 2
    assert torch.equal(model.encode_images(images()), pair.get_image_features(images()).pooler_output)
    native(kind).save_pretrained(tmp_path / "part")
    with pytest.raises(UserError, match=f"is a {kind}_vision_model; a umg_clip, a clip or a siglip is needed"):
        load_umg_clip(tmp_path / "part")
    with pytest.raises(UserError, match="no model can be opened"):
        load_umg_clip(tmp_path / "nothing")


@torch.no_grad()
def test_a_tower_without_a_pooled_output_gives_the_mean_of_its_patches(native, native_pair):
    model = UmgClipModel.from_pair(native_pair("siglip"))
    model.vision_tower = UmgClipVisionModel.from_native(native("siglip_headless"))
    torch.testing.assert_close(model.encode_images(images()), model.dense_embeddings(images()).mean((1, 2)))


def test_what_cannot_be_is_one_sentence(native, native_pair):
    with pytest.raises(UserError, match="made from a clip or a siglip, and this is a mlcd"):
        UmgClipModel.from_pair(native("mlcd"))
    model = UmgClipModel.from_pair(native_pair("siglip"))
    with pytest.raises(UserError, match="padded to the 8 tokens"):
        model.encode_texts(**texts(None))
    with pytest.raises(UserError, match="3 regions have 2 texts"):
        model(**batch(8) | {"region_input_ids": batch(8)["region_input_ids"][:2]})
    with pytest.raises(UserError, match=r"masks must be \(B=3, R, 4, 4\)"):
        model.encode_masks(images(), torch.ones(3, 4, 4))
    tower = UmgClipVisionModel.from_native(native("mlcd"))
    with pytest.raises(UserError, match="both towers must be equally wide"):
        UmgClipConfig(vision_config=tower.config, text_config=CLIPTextConfig(hidden_size=16), projection_dim=None)
    with pytest.raises(UserError, match="made from pixel_values"):
        tower(output_dense_features=True)
