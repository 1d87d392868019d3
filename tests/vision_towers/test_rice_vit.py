"""The RICE tower of LLaVA-OneVision-1.5 and a native MLCD are one network."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional

from regiontower.vision_towers import (
    RiceVisionModel,
    RoiVisionModel,
    UserError,
    encode_packed,
    load_tower,
    merge_order,
    to_mlcd_state,
    to_rice_vit_state,
)
from regiontower.vision_towers.rice_vit import rice_vit_config

CONFIG = {
    "model_type": "rice_vit",
    "depth": 4,
    "embed_dim": 32,
    "hidden_size": 32,
    "num_heads": 2,
    "intermediate_size": 64,
    "patch_size": 14,
    "spatial_merge_size": 2,
}


@pytest.fixture
def saved(native, tmp_path):
    """`saved(prefix, parts)` -> (folder, native tower): a LLaVA-OneVision-1.5 with a language model of one tensor."""

    def write(prefix: str = "visual.", parts: int = 1, **changes):
        tower = native("mlcd", image_size=560)
        state = {prefix + name: tensor.contiguous() for name, tensor in to_rice_vit_state(tower.state_dict()).items()}
        config = CONFIG | changes
        if prefix:
            state |= {f"{prefix}merger.ln_q.weight": torch.ones(32), "lm_head.weight": torch.ones(4, 4)}
            config = {"model_type": "llavaonevision1_5", "vision_config": config}
        (tmp_path / "config.json").write_text(json.dumps(config))
        if parts == 1:
            save_file(state, tmp_path / "model.safetensors")
        else:
            files = {name: f"model-{1 + (name == 'lm_head.weight')}.safetensors" for name in state}
            save_file({n: t for n, t in state.items() if n != "lm_head.weight"}, tmp_path / "model-1.safetensors")
            (tmp_path / "model-2.safetensors").write_bytes(b"must not be read")
            (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
        return tmp_path, tower

    return write


def packed(pixels: torch.Tensor) -> torch.Tensor:
    """Patches of a picture `(3, H, W)` as the model's processor writes them, in blocks of 2 x 2."""
    rows, columns = pixels.shape[1] // 14, pixels.shape[2] // 14
    grid = pixels.view(3, rows // 2, 2, 14, columns // 2, 2, 14)
    return grid.permute(1, 4, 2, 5, 0, 3, 6).reshape(rows * columns, 3 * 14 * 14)


def test_names_there_and_back_are_the_same_tensors(native):
    state = native("mlcd").state_dict()
    there = to_rice_vit_state(state)
    assert there["blocks.3.attn.qkv.weight"].shape == (96, 32) and not any("layrnorm" in name for name in there)
    back = to_mlcd_state(there)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state if "post_layernorm" not in name)


def test_names_of_either_layout_are_taken_and_others_refused(native):
    state = native("mlcd").state_dict()
    there = to_rice_vit_state(state)
    file = to_rice_vit_state({f"vision_model.{name}": tensor for name, tensor in state.items()})
    assert file.keys() == there.keys() and all(torch.equal(file[name], there[name]) for name in there)
    with pytest.raises(UserError, match=r"no tensor 'visual\.proj'"):
        to_rice_vit_state({"visual.proj": torch.ones(1)})


@pytest.mark.parametrize(("prefix", "parts"), [("visual.", 1), ("model.visual.", 2), ("", 1)])
def test_load_tower_opens_one_without_its_language_model(saved, prefix, parts):
    folder, tower = saved(prefix, parts)
    opened = load_tower(folder)
    pixels = torch.randn(1, 3, 56, 84)
    with torch.no_grad():
        expected, found = (t(pixels, output_hidden_states=True).hidden_states[-1] for t in (tower, opened))
    assert isinstance(opened, RiceVisionModel) and torch.equal(found, expected)
    assert isinstance(load_tower(folder, "roi"), RoiVisionModel)


def test_a_configuration_that_leaves_its_defaults_out_is_the_released_towers():
    config = rice_vit_config({"model_type": "llavaonevision1_5", "vision_config": {"model_type": "rice_vit"}})
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (1024, 24, 16)
    assert (config.intermediate_size, config.patch_size, config.image_size) == (4096, 14, 560)
    assert rice_vit_config({"vision_config": {"model_type": "mlcd_vision_model"}}) is None


def test_every_picture_of_a_packed_batch_gets_its_own_patches(native):
    """The published forward returns class tokens among the patches from the second picture on."""
    tower = native("mlcd")
    pictures = [torch.randn(3, rows * 14, columns * 14) for rows, columns in ((2, 4), (4, 2), (6, 4), (2, 2))]
    grids = [(picture.shape[1] // 14, picture.shape[2] // 14) for picture in pictures]
    with torch.no_grad():
        together = encode_packed(tower, torch.cat([packed(picture) for picture in pictures]), grids)
        for picture, grid, found in zip(pictures, grids, together, strict=True):
            alone = tower(picture[None]).last_hidden_state[0, 1:]
            assert torch.equal(found, alone[merge_order(grid)])


def published(state, patches, grids, heads=2):
    """The tower's published forward up to its last block, written down again: every picture's class token in front of
    its patches, attention within a picture, rotary positions `(y, x)` in the order of the patches.

    Returns `(patches + pictures, width)`, class tokens included.
    """
    width = len(state["class_embedding"])
    size = width // heads
    frequencies = 1 / 10000 ** (torch.arange(0, size // 2, 2) / (size // 2))

    def linear(x, name):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(x, name):
        return functional.layer_norm(x, (width,), state[f"{name}.weight"], state[f"{name}.bias"], 1e-5)

    def turned(x, angles):
        angles = torch.cat([angles, angles], -1)[:, None]
        first, second = x.chunk(2, -1)
        return x * angles.cos() + torch.cat([-second, first], -1) * angles.sin()

    outputs = []
    for given, (rows, columns) in zip(patches.split([r * c for r, c in grids]), grids, strict=True):
        y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        places = [p.view(rows // 2, 2, columns // 2, 2).permute(0, 2, 1, 3).flatten() for p in (y, x)]
        angles = torch.cat([torch.outer(place.float(), frequencies) for place in places], -1)
        angles = torch.cat([state["class_pos_emb"], angles])
        tokens = torch.cat([state["class_embedding"][None], given @ state["patch_embed.proj.weight"].flatten(1).T])
        tokens = norm(tokens, "pre_layernorm")
        for block in range(4):
            name = f"blocks.{block}"
            qkv = linear(norm(tokens, f"{name}.norm1"), f"{name}.attn.qkv").view(len(tokens), 3, heads, size)
            q, k, v = qkv.unbind(1)
            scores = torch.einsum("qhd,khd->hqk", turned(q, angles), turned(k, angles)) / size**0.5
            mixed = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1)
            tokens = tokens + linear(mixed, f"{name}.attn.proj")
            hidden = functional.gelu(linear(norm(tokens, f"{name}.norm2"), f"{name}.mlp.fc1"))
            tokens = tokens + linear(hidden, f"{name}.mlp.fc2")
        outputs.append(tokens)
    return torch.cat(outputs)


def test_the_published_forward_is_this_one_but_for_where_it_cuts_class_tokens_out(native):
    """Its offsets are those before class tokens were put in: right for one picture, wrong from the second on."""
    tower = native("mlcd")
    grids = [(2, 4), (4, 2), (6, 4)]
    patches = torch.cat([packed(torch.randn(3, rows * 14, columns * 14)) for rows, columns in grids])
    with torch.no_grad():
        ours = encode_packed(tower, patches, grids)
        whole = published(to_rice_vit_state(tower.state_dict()), patches, grids)
    starts = [0, 8, 16]  # of each picture among the patches
    for number, (start, found) in enumerate(zip(starts, ours, strict=True)):
        right = whole[start + number + 1 :][: len(found)]
        cut_there = whole[start + 1 :][: len(found)]
        torch.testing.assert_close(found, right, atol=1e-4, rtol=1e-4)
        assert torch.allclose(found, cut_there, atol=1e-3) == (number == 0)


def test_blocks_of_two_by_two_come_first():
    assert merge_order((2, 4)).tolist() == [0, 1, 4, 5, 2, 3, 6, 7]


def test_what_is_none_is_refused_in_one_line(saved, native):
    folder, _ = saved(depth=5)
    cases = {
        "lacks 16 tensors": lambda: load_tower(folder),
        "no tensor 'blocks.0.ls1'": lambda: to_mlcd_state({"visual.blocks.0.ls1": torch.ones(1)}),
        "an even number of rows": lambda: merge_order((3, 4)),
        "hold 4 patches, and 5 are given": lambda: encode_packed(native("mlcd"), torch.zeros(5, 588), [(2, 2)]),
    }
    for words, call in cases.items():
        with pytest.raises(UserError, match=words) as error:
            call()
        assert "\n" not in str(error.value)
