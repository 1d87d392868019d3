"""RICE's region stream: against a slow twin, and what must not matter to a region."""

import math

import pytest
import torch

from regiontower.vision_towers import (
    RiceVisionConfig,
    RiceVisionModel,
    TowerFeatures,
    UserError,
    encode_regions,
    load_tower,
    pad_boxes,
)
from regiontower.vision_towers.region_boxes import patches_in_boxes

PATCH = 14
EVERYTHING = [0.0, 0, 56, 56]
BOXES = torch.tensor([EVERYTHING, [14, 14, 42, 42], [3, 40, 20, 56], [15, 15, 17, 17], [42, 42, 56, 56]])


@pytest.fixture
def rice(native):
    """A RICE tower of 4 layers, the last two (or `num_region_layers`) of them region layers."""

    def build(attention: str = "sdpa", **fields) -> RiceVisionModel:
        tower = native("mlcd", attention)
        config = RiceVisionConfig.from_native(tower.config, **fields)
        model = RiceVisionModel._from_config(config, attn_implementation=attention)
        model.load_state_dict(tower.state_dict())
        return model.eval()

    return build


def images(count: int = 1, height: int = 56, width: int = 56) -> torch.Tensor:
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(2))


def features_of(model: RiceVisionModel, pixels: torch.Tensor) -> TowerFeatures:
    output = model(pixels, output_hidden_states=list(model.region_feature_layers))
    return TowerFeatures.from_output(output, tuple(pixels.shape[-2:]), PATCH)


def inside_by_hand(box: list[float], rows: int, columns: int, rule: str) -> list[int]:
    """The patches of a box, one by one."""
    x1, y1, x2, y2 = box
    found, distances = [], []
    for row in range(rows):
        for column in range(columns):
            left, top = column * PATCH, row * PATCH
            x, y = left + PATCH / 2, top + PATCH / 2
            if rule == "centre":
                hit = x1 <= x <= x2 and y1 <= y <= y2
            else:
                hit = x1 < left + PATCH and x2 > left and y1 < top + PATCH and y2 > top
            if hit:
                found.append(row * columns + column)
            distances.append((x - (x1 + x2) / 2) ** 2 + (y - (y1 + y2) / 2) ** 2)
    return found or [distances.index(min(distances))]


def rotate(vector: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Rotary code of one head: the pair (j, j + d/2) is a complex number turned by angle j."""
    half = len(vector) // 2
    turned = torch.complex(vector[:half], vector[half:]) * torch.polar(torch.ones(half), angles)
    return torch.cat([turned.real, turned.imag])


def region_twin(model: RiceVisionModel, layer_inputs: list[torch.Tensor], box: list[float], columns: int):
    """One region of one image through all region layers, in loops: `layer_inputs` are `(1 + P, D)` each."""
    rows = (len(layer_inputs[0]) - 1) // columns
    patches = inside_by_hand(box, rows, columns, model.config.region_mask_rule)
    heads = model.config.num_attention_heads
    width = model.config.hidden_size // heads
    frequencies = torch.tensor([10000 ** (-2 * i / (width / 2)) for i in range(width // 4)])
    state = layer_inputs[0][0]
    for layer, image in zip(model.encoder.layers[-model.config.num_region_layers :], layer_inputs, strict=True):
        attention = layer.self_attn
        query = layer.layer_norm1(state)
        sources = [layer.layer_norm1(image[1 + patch]) for patch in patches] + [query]
        angles = [torch.cat([patch // columns * frequencies, patch % columns * frequencies]) for patch in patches]
        angles.append(model.class_pos_emb[0])
        mixed = []
        for head in range(heads):
            part = slice(head * width, (head + 1) * width)
            asking = rotate(attention.q_proj(query)[part], model.class_pos_emb[0])
            keys = [rotate(attention.k_proj(s)[part], a) for s, a in zip(sources, angles, strict=True)]
            weights = torch.stack([asking @ key / math.sqrt(width) for key in keys]).softmax(0)
            mixed.append(sum(w * attention.v_proj(s)[part] for w, s in zip(weights, sources, strict=True)))
        state = state + attention.out_proj(torch.cat(mixed))
        state = state + layer.mlp(layer.layer_norm2(state))
    return model.post_layernorm(state)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "fields", [{"num_region_layers": 1}, {}, {"num_region_layers": 4}, {"region_mask_rule": "overlap"}]
)
@pytest.mark.parametrize(("height", "width"), [(56, 56), (42, 84)])
@torch.no_grad()
def test_region_layers_equal_their_slow_twin(rice, attention, fields, height, width):
    model, pixels = rice(attention, **fields), images(1, height, width)
    states = model(pixels, output_hidden_states=True).hidden_states
    inputs = [states[layer][0] for layer in model.region_feature_layers]
    boxes = BOXES.clamp(max=min(height, width))
    (embeds,) = encode_regions(model, pixels, [boxes])
    for box, embed in zip(boxes.tolist(), embeds, strict=True):
        torch.testing.assert_close(embed, region_twin(model, inputs, box, width // PATCH), atol=3e-5, rtol=1e-5)


@pytest.mark.parametrize("rule", ["centre", "overlap"])
def test_patches_of_random_boxes_are_those_found_by_hand(rule):
    generator = torch.Generator().manual_seed(3)
    corners = torch.rand(300, 2, 2, generator=generator) * torch.tensor([84.0, 42.0])
    corners[:150, 1] = corners[:150, 0] + (corners[:150, 1] - corners[:150, 0]) / 20  # half of them are tiny
    corners[200:] = (corners[200:] / 7).round() * 7  # edges on patch edges and patch centres
    boxes = torch.cat([corners.amin(1), corners.amax(1)], dim=1)
    inside = patches_in_boxes(boxes[None], (3, 6), PATCH, rule)[0]
    for box, row in zip(boxes.tolist(), inside, strict=True):
        assert row.nonzero().flatten().tolist() == inside_by_hand(box, 3, 6, rule)


def test_overlap_takes_what_the_box_touches_and_centre_what_it_holds():
    box = torch.tensor([[[6.0, 6, 30, 20]]])
    centre = patches_in_boxes(box, (3, 3), PATCH, "centre")[0, 0].view(3, 3)
    overlap = patches_in_boxes(box, (3, 3), PATCH, "overlap")[0, 0].view(3, 3)
    assert centre.tolist() == [[True, True, False], [False] * 3, [False] * 3]
    assert overlap.tolist() == [[True] * 3, [True] * 3, [False] * 3]
    exact = torch.tensor([[[14.0, 14, 28, 28]]])  # shares edges with its neighbours, and that is no overlap
    assert patches_in_boxes(exact, (3, 3), PATCH, "overlap").sum() == 1


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_what_lies_outside_a_region_cannot_reach_it(rice, attention):
    model = rice(attention)
    features = features_of(model, images())
    before = model(features=features, boxes=BOXES[None, 1:2]).region_embeds
    inside = patches_in_boxes(BOXES[None, 1:2], (4, 4), PATCH, "centre")[0, 0]
    assert 0 < inside.sum() < 16

    for layer in model.region_feature_layers:
        tokens = features.hidden[layer][0]
        tokens[1:][~inside] = 10 * torch.randn(int((~inside).sum()), 32)
        if layer != model.region_feature_layers[0]:  # the query starts as the first one's CLS, later ones are unseen
            tokens[0] = 10 * torch.randn(32)
    assert torch.equal(model(features=features, boxes=BOXES[None, 1:2]).region_embeds, before)

    for layer in model.region_feature_layers:
        changed = TowerFeatures({k: v.clone() for k, v in features.hidden.items()}, (4, 4), (56, 56))
        changed.hidden[layer][0, 1:][inside] += torch.randn(32)
        assert (model(features=changed, boxes=BOXES[None, 1:2]).region_embeds - before).abs().max() > 1e-2


@torch.no_grad()
def test_a_region_does_not_see_other_regions(rice):
    model = rice()
    (together,) = encode_regions(model, images(), [BOXES])
    for row in range(len(BOXES)):
        (alone,) = encode_regions(model, images(), [BOXES[row : row + 1]])
        torch.testing.assert_close(alone[0], together[row], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rule", ["centre", "overlap"])
@pytest.mark.parametrize(("height", "width"), [(56, 56), (42, 84)])
@torch.no_grad()
def test_a_box_over_everything_is_the_pooled_image(rice, rule, height, width):
    model, pixels = rice(region_mask_rule=rule), images(2, height, width)
    output = model(pixels, boxes=torch.tensor([0.0, 0, width, height]).expand(2, 1, 4))
    torch.testing.assert_close(output.region_embeds[:, 0], output.pooler_output, atol=2e-5, rtol=1e-5)


@torch.no_grad()
def test_a_box_smaller_than_a_patch_is_that_patch(rice):
    boxes = torch.tensor([[15.0, 15, 17, 17], [14, 14, 28, 28], [20, 20, 20, 20], [56, 56, 56, 56], [42, 42, 56, 56]])
    (embeds,) = encode_regions(rice(), images(), [boxes])
    torch.testing.assert_close(embeds[0], embeds[1])
    torch.testing.assert_close(embeds[2], embeds[1])  # no area at all
    torch.testing.assert_close(embeds[3], embeds[4])  # the far corner of the image
    assert (embeds[1] - embeds[4]).abs().max() > 1e-2


@torch.no_grad()
def test_a_padded_batch_equals_one_by_one(rice):
    model, pixels = rice(), images(3)
    lists = [BOXES[:0], BOXES[1:2], BOXES[2:5]]
    padded, counts = pad_boxes(lists)
    assert counts.tolist() == [0, 1, 3]
    for row, count in enumerate(counts.tolist()):
        padded[row, count:] = torch.tensor([5.0, 5, 50, 50])  # what stands in the padding is not read
    embeds = model(pixels, boxes=padded, region_counts=counts).region_embeds
    assert embeds.shape == (3, 3, 32)
    assert embeds[0].abs().max() == 0 and embeds[1, 1:].abs().max() == 0
    for row, boxes in enumerate(lists):
        (alone,) = encode_regions(model, pixels[row : row + 1], [boxes])
        assert alone.shape == (len(boxes), 32)
        torch.testing.assert_close(embeds[row, : len(boxes)], alone, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_no_boxes_at_all_is_an_empty_answer(rice):
    model = rice()
    output = model(images(2), boxes=torch.zeros(2, 0, 4))
    assert output.region_embeds.shape == (2, 0, 32)
    assert torch.equal(output.last_hidden_state, model(images(2)).last_hidden_state)
    assert [tuple(embeds.shape) for embeds in encode_regions(model, images(2), [BOXES[:0], []])] == [(0, 32)] * 2


@pytest.mark.parametrize("layers", [1, 2, 4])
@torch.no_grad()
def test_kept_features_give_the_same_regions(rice, layers):
    model, pixels = rice(num_region_layers=layers), images(2, 42, 84)
    boxes = BOXES.clamp(max=42).expand(2, -1, -1)
    full = model(pixels, boxes=boxes).region_embeds
    features = features_of(model, pixels)
    assert set(features.hidden) == set(model.region_feature_layers)
    assert (model(features=features, boxes=boxes).region_embeds - full).abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision_weights_work_and_half_precision_boxes_are_refused(rice, dtype):
    model = rice()
    exact = model(images(), boxes=BOXES[None]).region_embeds
    model = model.to(dtype)
    coarse = model(images().to(dtype), boxes=BOXES[None]).region_embeds
    assert coarse.dtype == dtype
    assert torch.nn.functional.cosine_similarity(coarse.float(), exact, dim=-1).min() > 0.99
    with pytest.raises(UserError, match="float32") as caught:
        model(images().to(dtype), boxes=BOXES[None].to(dtype))
    assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(UserError, match="float32"):
        encode_regions(model, images().to(dtype), [BOXES.to(dtype)])


@torch.no_grad()
def test_autocast_stays_finite_and_near(rice):
    model = rice()
    exact = model(images(), boxes=BOXES[None]).region_embeds
    with torch.autocast("cpu", dtype=torch.bfloat16):
        coarse = model(images(), boxes=BOXES[None]).region_embeds
    assert torch.nn.functional.cosine_similarity(coarse.float(), exact, dim=-1).min() > 0.99


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"boxes": BOXES}, r"boxes must be \(B=2, R, 4\)"),
        ({"boxes": torch.zeros(2, 3, 5)}, r"boxes must be \(B=2, R, 4\)"),
        ({"boxes": torch.zeros(3, 1, 4)}, r"boxes must be \(B=2, R, 4\)"),
        ({"boxes": [BOXES, BOXES]}, "pad_boxes"),
        ({"boxes": torch.zeros(2, 1, 4), "region_counts": torch.tensor([1])}, r"region_counts must be \(B=2,\)"),
        ({"boxes": torch.zeros(2, 1, 4), "pixel_values": None}, "pixel_values"),
        ({"boxes": torch.zeros(3, 1, 4), "pixel_values": torch.zeros(3, 56, 56)}, "pixel_values"),
        ({"boxes": torch.zeros(2, 1, 4), "pixel_values": torch.zeros(2, 3, 13, 56)}, "at least a patch"),
        ({"features": TowerFeatures({}, (4, 4), (56, 56))}, "features"),
        ({"features": TowerFeatures({2: torch.zeros(2, 17, 32)}, (4, 4), (56, 56)), "boxes": BOXES[None]}, "3"),
    ],
)
def test_wrong_input_is_one_sentence(rice, arguments, named):
    with pytest.raises(UserError, match=named) as caught:
        rice()(**({"pixel_values": images(2)} | arguments))
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("boxes", [[BOXES[0]], [torch.zeros(2, 5)], [BOXES, BOXES]])
def test_wrong_box_lists_are_one_sentence(rice, boxes):
    with pytest.raises(UserError) as caught:
        encode_regions(rice(), images(), boxes)
    assert len(str(caught.value).splitlines()) == 1


def region_gradients(model: RiceVisionModel) -> dict[str, torch.Tensor]:
    model.zero_grad()
    embeds = model(images(), boxes=BOXES[None]).region_embeds
    (embeds * torch.randn(embeds.shape, generator=torch.Generator().manual_seed(4))).sum().backward()
    gradients = {name: weight.grad for name, weight in model.named_parameters()}
    assert all(gradient is not None for gradient in gradients.values())
    return gradients


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_region_loss_reaches_every_parameter(rice, attention):
    gradients = region_gradients(rice(attention))
    assert [name for name, gradient in gradients.items() if not gradient.abs().max() > 1e-6] == []


def test_checkpointing_gives_the_same_gradients(rice):
    plain = region_gradients(rice().train())
    model = rice().train()
    model.activation_checkpointing_enable({"use_reentrant": False})
    runs = []
    model.encoder.layers[-1].mlp.register_forward_hook(lambda *_: runs.append(1))
    for name, gradient in region_gradients(model).items():
        assert torch.equal(gradient, plain[name]), name
    assert len(runs) > 2  # region and image stream once, and again in the backward pass


@torch.no_grad()
def test_the_region_path_compiles_as_one_graph(rice):
    model = rice()
    expected = model(images(), boxes=BOXES[None]).region_embeds
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="eager")
    torch.testing.assert_close(compiled(images(), boxes=BOXES[None]).region_embeds, expected)


@torch.no_grad()
def test_readouts_can_be_opened_side_by_side(rice, native, tmp_path):
    """RICE against RoIAlign on the same weights."""
    native("mlcd").save_pretrained(tmp_path)
    by_region, by_roi = load_tower(tmp_path), load_tower(tmp_path, readout="roi")
    assert torch.equal(by_region(images()).last_hidden_state, by_roi(images()).last_hidden_state)
    (one,), (two,) = (encode_regions(tower, images(), [BOXES]) for tower in (by_region, by_roi))
    assert one.shape == two.shape and not torch.allclose(one, two)
