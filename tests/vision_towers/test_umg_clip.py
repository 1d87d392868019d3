"""UMG-CLIP's tower: dense features by the value path or by the pooling head, checked against hand-written twins."""

import pytest
import torch
from torch.nn.functional import layer_norm
from transformers import AutoModel

from regiontower.vision_towers import (
    TowerFeatures,
    UmgClipVisionModel,
    UserError,
    describe_tower,
    encode_regions,
    load_tower,
)

BOXES = torch.tensor([[[0.0, 0, 56, 56], [14, 14, 28, 28]], [[3, 40, 20, 56], [0, 0, 0, 0]]])
COUNTS = torch.tensor([2, 1])


def images() -> torch.Tensor:
    return torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("name", ["clip", "mlcd"])
@torch.no_grad()
def test_the_value_path_token_by_token(native, name):
    tower = native(name)
    model = UmgClipVisionModel.from_native(tower)
    assert (model.config.pooling, model.config.region_layer) == ("value", -2)
    states = tower(images(), output_hidden_states=True).hidden_states[-2]
    weights = {key.split("layers.3.")[-1]: value for key, value in tower.state_dict().items() if "layers.3." in key}

    def linear(x, part):
        return x @ weights[f"{part}.weight"].T + weights[f"{part}.bias"]

    def norm(x, part):
        return layer_norm(x, (32,), weights[f"{part}.weight"], weights[f"{part}.bias"], tower.config.layer_norm_eps)

    for image, token in ((0, 6), (1, 16)):
        h = states[image, token]
        y = h + linear(linear(norm(h, "layer_norm1"), "self_attn.v_proj"), "self_attn.out_proj")
        inner = tower.encoder.layers[3].mlp.activation_fn(linear(norm(y, "layer_norm2"), "mlp.fc1"))
        expected = tower.post_layernorm(y + linear(inner, "mlp.fc2"))
        torch.testing.assert_close(model.dense_features(states)[image, token], expected)


@torch.no_grad()
def test_the_head_with_patches_as_queries(native):
    tower = native("siglip")
    model = UmgClipVisionModel.from_native(tower)
    assert (model.config.pooling, model.config.region_layer) == ("map", -1)
    output = tower(images(), output_hidden_states=True)
    states = output.hidden_states[-1]
    dense = model.dense_features(states)
    # The head's answer to one query is what it pools when that query is its probe.
    tower.head.probe.copy_(tower.post_layernorm(states)[1, 5])
    torch.testing.assert_close(dense[1, 5], tower(images()).pooler_output[1])


@pytest.mark.parametrize("name", ["clip", "mlcd", "siglip"])
@torch.no_grad()
def test_regions_are_means_of_dense_features_and_the_image_stream_is_native(native, name):
    tower = native(name)
    model = UmgClipVisionModel.from_native(tower)
    output = model(images(), BOXES, COUNTS)
    assert torch.equal(output.last_hidden_state, tower(images()).last_hidden_state)
    layer = model.region_feature_layers[0]
    states = tower(images(), output_hidden_states=True).hidden_states[layer]
    patches = model.dense_features(states[:, -16:]).unflatten(1, (4, 4))
    torch.testing.assert_close(
        output.region_embeds[0, 1], patches[0, 1, 1]
    )  # a box of one patch: one sample, its centre
    assert not output.region_embeds[1, 1].any()
    for mine, alone in zip(
        output.region_embeds, encode_regions(model, images(), [BOXES[0], BOXES[1, :1]]), strict=True
    ):
        torch.testing.assert_close(mine[: len(alone)], alone)
    first = model(images(), output_hidden_states=True)
    features = TowerFeatures.from_output(first, (56, 56), 14)
    assert torch.equal(model(features=features, boxes=BOXES, region_counts=COUNTS).region_embeds, output.region_embeds)


@pytest.mark.parametrize("name", ["clip", "siglip"])
@torch.no_grad()
def test_save_and_open(native, tmp_path, name):
    model = UmgClipVisionModel.from_native(native(name), roi_size=2)
    model.save_pretrained(tmp_path)
    expected = model(images(), BOXES).region_embeds
    for opened in (load_tower(tmp_path), AutoModel.from_pretrained(tmp_path)):
        assert opened.config.roi_size == 2
        assert torch.equal(opened(images(), BOXES).region_embeds, expected)
    assert describe_tower(model.config).region_readout == "umg_clip"


@pytest.mark.parametrize("target", ["v_proj", "out_proj"])
def test_an_adapter_on_the_value_path_counts(native, target):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = UmgClipVisionModel.from_native(native("clip"))
    states = model(images(), output_hidden_states=True).hidden_states[-2].detach()
    before = model.dense_features(states)
    lora = LoraConfig(r=2, target_modules=[f"tower.encoder.layers.3.self_attn.{target}"], init_lora_weights=False)
    tuned = get_peft_model(model, lora)
    # Of the same input to the last block, so that nothing but the value path itself can tell.
    after = tuned.get_base_model().dense_features(states)
    assert (after - before).abs().max() > 1e-3
    after.square().sum().backward()
    adapters = {name: weight for name, weight in tuned.named_parameters() if weight.requires_grad}
    assert len(adapters) == 2 and all(weight.grad.any() for weight in adapters.values())


@pytest.mark.parametrize(
    ("name", "fields", "named"),
    [
        ("clip", {"pooling": "map"}, "needs a tower with an attention-pooling head"),
        ("dinov2", {}, "is for CLIP and MLCD towers"),
        ("siglip_headless", {"pooling": "map"}, "attention-pooling head"),
        ("clip", {"region_layer": -1}, "after the last there is none"),
        ("clip", {"pooling": "mean"}, "pooling must be one of"),
        ("clip", {"roi_size": 0}, "roi_size"),
    ],
)
def test_what_cannot_be_is_one_sentence(native, name, fields, named):
    with pytest.raises(UserError, match=named):
        UmgClipVisionModel.from_native(native(name), **fields)
