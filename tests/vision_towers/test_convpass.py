"""Convpass against a twin that goes token by token, and inside towers."""

import pytest
import torch
from torch.nn.functional import gelu

from regiontower.vision_towers import UmgClipVisionModel, UserError, add_convpass, load_convpass, save_convpass
from regiontower.vision_towers.convpass import Convpass

BOXES = torch.tensor([[[0.0, 0, 56, 56], [14, 14, 42, 42]]] * 2)
TOWERS = ["clip", "siglip", "mlcd"]


def images() -> torch.Tensor:
    return torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(2))


def stir(tower) -> None:
    """Adapters as training might leave them."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, weight in tower.named_parameters():
            if ".convpass." in name:
                weight.add_(0.2 * torch.randn(weight.shape, generator=generator))


@pytest.mark.parametrize("prefix", [0, 1])
@torch.no_grad()
def test_equals_the_formula(prefix):
    adapter = Convpass(6, prefix, bottleneck=4, scale=0.5)
    generator = torch.Generator().manual_seed(0)
    for weight in adapter.parameters():
        weight.copy_(torch.randn(weight.shape, generator=generator))
    tokens = torch.randn(2, 9 + prefix, 6, generator=generator)
    found = adapter(tokens)
    small = gelu(tokens @ adapter.down.weight.T + adapter.down.bias)

    def expected(image, number):
        """CLS has no neighbours; a patch has those around it that exist."""
        if number < prefix:
            mixed = adapter.conv.weight[:, :, 1, 1] @ small[image, number]
        else:
            row, column = divmod(number - prefix, 3)
            mixed = torch.zeros(4)
            for i in range(max(0, row - 1), min(3, row + 2)):
                for j in range(max(0, column - 1), min(3, column + 2)):
                    tap = adapter.conv.weight[:, :, i - row + 1, j - column + 1]
                    mixed += tap @ small[image, prefix + 3 * i + j]
        return 0.5 * (adapter.up.weight @ gelu(mixed + adapter.conv.bias) + adapter.up.bias)

    for image in range(2):
        for number in range(9 + prefix):
            torch.testing.assert_close(found[image, number], expected(image, number))


@pytest.mark.parametrize("name", TOWERS)
@torch.no_grad()
def test_a_new_adapter_changes_nothing_and_a_trained_one_does(native, name):
    plain, tuned = native(name), native(name)
    add_convpass(tuned)
    expected, found = plain(images()), tuned(images())
    assert torch.equal(found.last_hidden_state, expected.last_hidden_state)
    # Where a pooling head's weights lie in memory shows in the last bits on some processors.
    torch.testing.assert_close(found.pooler_output, expected.pooler_output)
    before = UmgClipVisionModel.from_native(plain)(images(), BOXES).region_embeds
    model = UmgClipVisionModel.from_native(tuned)
    torch.testing.assert_close(model(images(), BOXES).region_embeds, before)
    stir(tuned)
    assert (tuned(images()).last_hidden_state - expected.last_hidden_state).abs().max() > 1e-2
    assert (model(images(), BOXES).region_embeds - before).abs().max() > 1e-2
    own = {name: value for name, value in tuned.state_dict().items() if ".convpass." not in name}
    assert own.keys() == plain.state_dict().keys()  # the native names stay
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in own.items())


@torch.no_grad()
def test_beside_both_parts_of_a_block(native):
    tower = native("clip")
    add_convpass(tower, scale=0.3)
    stir(tower)
    layer = tower.encoder.layers[1]
    states = torch.randn(1, 17, 32, generator=torch.Generator().manual_seed(0))
    plain = native("clip").encoder.layers[1]
    normed = plain.layer_norm1(states)
    middle = states + plain.self_attn(normed, attention_mask=None)[0] + layer.self_attn.convpass(normed)
    normed = plain.layer_norm2(middle)
    expected = middle + plain.mlp(normed) + layer.mlp.convpass(normed)
    torch.testing.assert_close(layer(states, None), expected)


@torch.no_grad()
def test_the_value_path_passes_by_the_adapters_of_its_block(native):
    tower = native("clip")
    model = UmgClipVisionModel.from_native(tower)
    states = torch.randn(1, 17, 32, generator=torch.Generator().manual_seed(0))
    before = model.dense_features(states)
    add_convpass(tower)
    for place in ("self_attn", "mlp"):
        adapter = getattr(tower.encoder.layers[3], place).convpass
        adapter.up.bias[:16] = 0.5
        assert (model.dense_features(states) - before).abs().max() > 1e-3, place
        adapter.up.bias.zero_()
    assert torch.equal(model.dense_features(states), before)


@pytest.mark.parametrize("name", TOWERS)
def test_only_the_adapters_are_trained(native, name):
    tower = native(name)
    add_convpass(tower)
    stir(tower)
    UmgClipVisionModel.from_native(tower)(images(), BOXES).region_embeds.square().sum().backward()
    learned = {key for key, weight in tower.named_parameters() if weight.grad is not None}
    assert learned and all(".convpass." in key for key in learned)
    trainable = {key for key, weight in tower.named_parameters() if weight.requires_grad}
    assert len(trainable) == 4 * 2 * 6 and all(".convpass." in key for key in trainable)


@pytest.mark.parametrize("name", TOWERS)
@torch.no_grad()
def test_saved_alone_and_put_into_another_tower(native, tmp_path, name):
    tower = native(name)
    add_convpass(tower, bottleneck=4, scale=0.7)
    stir(tower)
    save_convpass(tower, tmp_path / "adapter.safetensors")
    other = native(name)
    load_convpass(other, tmp_path / "adapter.safetensors")
    assert other.encoder.layers[0].mlp.convpass.scale == 0.7
    assert torch.equal(other(images()).last_hidden_state, tower(images()).last_hidden_state)
    whole = sum(value.numel() for value in tower.state_dict().values())
    assert (tmp_path / "adapter.safetensors").stat().st_size < 4 * whole / 3


def test_what_cannot_be_is_one_sentence(native, tmp_path):
    tower = native("mlcd")
    with pytest.raises(UserError, match="no Convpass to save"):
        save_convpass(tower, tmp_path / "a.safetensors")
    add_convpass(tower)
    with pytest.raises(UserError, match="has a Convpass already"):
        add_convpass(tower)
    with pytest.raises(UserError, match="square grid of patches, and the image has 24"):
        tower(torch.randn(1, 3, 56, 84))  # with CLS these are 25, a square
    with pytest.raises(UserError, match="merged tokens have none"):
        UmgClipVisionModel.from_native(tower, reduce_after=1)(images())
    save_convpass(tower, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="another width or depth"):
        load_convpass(native("clip", num_hidden_layers=2), tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="there is no file"):
        load_convpass(native("clip"), tmp_path / "b.safetensors")
    (tmp_path / "c.safetensors").write_text("nothing of the kind")
    with pytest.raises(UserError, match="no safetensors file"):
        load_convpass(native("clip"), tmp_path / "c.safetensors")
    native("clip").save_pretrained(tmp_path)
    with pytest.raises(UserError, match="holds no Convpass"):
        load_convpass(native("clip"), tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="and this is a dinov2"):
        add_convpass(native("dinov2"))
