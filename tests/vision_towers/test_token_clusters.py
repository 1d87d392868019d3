"""Clusters of tokens against a twin that goes pair by pair, and towers that merge tokens on the way."""

import math

import pytest
import torch
from torch.nn.functional import layer_norm

from regiontower.vision_towers import UmgClipVisionModel, UserError, load_tower
from regiontower.vision_towers.token_clusters import cluster_tokens

BOXES = torch.tensor([[[0.0, 0, 56, 56], [14, 14, 28, 28]], [[3, 40, 20, 56], [0, 0, 0, 0]]])


def images() -> torch.Tensor:
    return torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(2))


def twin(points: list[list[float]], count: int, k: int) -> list[int]:
    """By loops: the cluster of each token, clusters in the order of their centres' rho delta."""
    total, width = len(points), len(points[0])
    distance = [[math.dist(a, b) / math.sqrt(width) for b in points] for a in points]
    density = []
    for i in range(total):
        near = sorted(distance[i][j] for j in range(total) if j != i)[:k]
        density.append(math.exp(-sum(d * d for d in near) / len(near)))
    scores = []
    for i in range(total):
        denser = [distance[i][j] for j in range(total) if (density[j], -j) > (density[i], -i)]
        scores.append(density[i] * (min(denser) if denser else max(distance[i])))
    centres = sorted(range(total), key=lambda i: -scores[i])[:count]
    return [min(range(count), key=lambda c: distance[i][centres[c]]) for i in range(total)]


@pytest.mark.parametrize("count", [1, 4, 11])
@pytest.mark.parametrize("neighbours", [1, 5, 50])
def test_equals_the_formula(count, neighbours):
    tokens = torch.randn(3, 12, 6, generator=torch.Generator().manual_seed(4))
    tokens *= torch.tensor([0.3, 1, 2])[:, None, None]
    found = cluster_tokens(tokens, count, neighbours)
    expected = [twin(image.tolist(), count, min(neighbours, 11)) for image in tokens]
    assert found.cluster.tolist() == expected and found.count == count


def test_blobs_are_found_and_merged_to_their_means():
    middles = torch.tensor([[0.0, 0], [10, 0], [0, 10]])
    order = torch.tensor([0, 1, 2, 1, 0, 2, 2, 0, 1, 0])
    tokens = (middles[order] + 0.1 * torch.randn(10, 2, generator=torch.Generator().manual_seed(0)))[None]
    found = cluster_tokens(tokens, 3, 2)
    assert all(len(set(found.cluster[0, order == blob].tolist())) == 1 for blob in range(3))
    merged = found.merge(tokens)
    for blob in range(3):
        members = tokens[0, order == blob]
        torch.testing.assert_close(merged[0, found.cluster[0, order == blob][0]], members.mean(0))
    back = found.unmerge(merged)
    torch.testing.assert_close(back[0, 4], tokens[0, order == 0].mean(0))


def test_equal_tokens_leave_no_cluster_empty():
    tokens = torch.ones(2, 8, 4)
    tokens[1, :3] = 5.0
    found = cluster_tokens(tokens, 5)
    assert all(len(set(row.tolist())) == 5 for row in found.cluster)
    assert torch.isfinite(found.merge(tokens)).all()


def test_a_gradient_reaches_every_token():
    tokens = torch.randn(2, 9, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    found = cluster_tokens(tokens, 3)
    found.unmerge(found.merge(tokens)).sum().backward()
    # Each token's cluster is copied to all its members and is their mean: in sum every token counts once.
    torch.testing.assert_close(tokens.grad, torch.ones_like(tokens))


@pytest.mark.parametrize("name", ["clip", "mlcd", "siglip", "siglip_headless"])
@torch.no_grad()
def test_a_share_of_1_is_the_tower_itself(native, name):
    plain = UmgClipVisionModel.from_native(native(name))
    merging = UmgClipVisionModel.from_native(native(name), reduce_after=2, reduce_to=1.0)
    asked = {"output_hidden_states": True, "output_dense_features": True}
    expected, found = plain(images(), BOXES, **asked), merging(images(), BOXES, **asked)
    for key in ("last_hidden_state", "pooler_output", "region_embeds", "dense_features"):
        if expected.get(key) is not None:
            torch.testing.assert_close(found[key], expected[key], msg=lambda text, k=key: f"{k}: {text}")
    for mine, theirs in zip(found.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(mine, theirs)
    assert found.pooler_output is not None or name == "siglip_headless"


@pytest.mark.parametrize("name", ["clip", "mlcd", "siglip"])
@torch.no_grad()
def test_merged_blocks_by_hand(native, name):
    """Blocks 3 and 4 on 6 clusters of an image alone, from the states that the native tower has after block 2."""
    tower = native(name)
    merging = UmgClipVisionModel.from_native(tower, reduce_after=2, reduce_to=6 / 16)
    seen, sequences = [], []
    found = merging(images(), output_hidden_states=True)
    states = tower(images(), output_hidden_states=True).hidden_states[2]
    torch.testing.assert_close(found.hidden_states[2], states)
    prefix = states.shape[1] - 16
    clusters = cluster_tokens(layer_norm(states[:, prefix:], (32,)), 6)
    for image in range(2):
        members = [(clusters.cluster[image] == number).nonzero()[:, 0] for number in range(6)]
        rows = [states[image, :prefix], *(states[image, prefix:][at].mean(0, keepdim=True) for at in members)]
        short = torch.cat(rows)[None]
        angles = ()
        if name == "mlcd":
            middles = torch.stack([torch.stack([at // 4, at % 4], 1).float().mean(0) for at in members])
            cos, sin = tower.vision_rotary_embedding(short, middles)
            own = torch.cat([tower.class_pos_emb] * 2, dim=-1)
            angles = ((torch.cat([own.cos(), cos]), torch.cat([own.sin(), sin])),)
        for layer in tower.encoder.layers[2:]:
            short = layer(short, *(angles or (None,)))
        sequences.append(short[0])
        whole = torch.cat([short[0, :prefix], short[0, prefix:][clusters.cluster[image]]])
        seen.append(whole)
    torch.testing.assert_close(found.hidden_states[4], torch.stack(seen), rtol=1e-4, atol=1e-5)
    assert sequences[0].shape[0] == prefix + 6
    assert (found.hidden_states[4] - tower(images(), output_hidden_states=True).hidden_states[4]).abs().max() > 1e-2


@torch.no_grad()
def test_saved_with_the_tower_and_switched_off(native, tmp_path):
    UmgClipVisionModel.from_native(native("clip"), reduce_after=1, reduce_to=0.25).save_pretrained(tmp_path)
    opened = load_tower(tmp_path)
    assert (opened.config.reduce_after, opened.config.reduce_to) == (1, 0.25)
    merged = opened(images()).pooler_output
    opened.config.reduce_after = None
    assert torch.equal(opened(images()).pooler_output, native("clip")(images()).pooler_output)
    assert (merged - opened(images()).pooler_output).abs().max() > 1e-3


def test_every_parameter_learns_through_merged_tokens(native):
    for name in ("clip", "mlcd", "siglip"):
        model = UmgClipVisionModel.from_native(native(name).requires_grad_(True), reduce_after=2)
        output = model.train()(images(), BOXES, output_dense_features=True)
        (output.pooler_output.tanh().sum() + output.region_embeds.tanh().sum()).backward()
        assert all(weight.grad is not None for weight in model.parameters())


@pytest.mark.parametrize(
    ("fields", "named"),
    [({"reduce_after": 4}, "reduce_after must be 1 to 3"), ({"reduce_to": 0.0}, r"reduce_to must be in \(0, 1\]")],
)
def test_what_cannot_be_is_one_sentence(native, fields, named):
    with pytest.raises(UserError, match=named):
        UmgClipVisionModel.from_native(native("clip"), **fields)
