"""The RICE tower of LLaVA-OneVision-1.5 and a native MLCD are one network."""

import json

import pytest
import torch
from safetensors.torch import save_file

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


@pytest.mark.parametrize(("prefix", "parts"), [("visual.", 1), ("model.visual.", 2), ("", 1)])
def test_load_tower_opens_one_without_its_language_model(saved, prefix, parts):
    folder, tower = saved(prefix, parts)
    opened = load_tower(folder)
    pixels = torch.randn(1, 3, 56, 84)
    with torch.no_grad():
        expected, found = (t(pixels, output_hidden_states=True).hidden_states[-1] for t in (tower, opened))
    assert isinstance(opened, RiceVisionModel) and torch.equal(found, expected)
    assert isinstance(load_tower(folder, "roi"), RoiVisionModel)


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
