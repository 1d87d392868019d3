"""Towers that bring their code: the same numbers where this package cannot be imported."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoTokenizer, CLIPTextConfig

from regiontower.vision_towers import (
    ClocConfig,
    ClocModel,
    ClocVisionModel,
    RiceVisionConfig,
    RiceVisionModel,
    RoiVisionModel,
    UmgClipModel,
    UmgClipVisionModel,
    UserError,
    export_native,
    export_remote_code,
    load_tower,
)
from regiontower.vision_towers.remote_code import registering

BOXES = torch.tensor([[[0.0, 0, 56, 56], [14, 14, 42, 42]], [[3, 40, 20, 56], [0, 0, 9, 9]]])
READER = """
import re, sys
from pathlib import Path
import torch
from transformers import AutoModel

try:
    import regiontower
except ImportError:
    pass
else:
    raise SystemExit("the package can be imported")
root = Path(sys.argv[1])
inputs, found = torch.load(root / "inputs.pt"), {}
for folder in sorted((root / "exported").iterdir()):
    code = {"trust_remote_code": True} if list(folder.glob("*.py")) else {}
    model, info = AutoModel.from_pretrained(folder, output_loading_info=True, **code)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), (folder, info)
    model.eval()
    with torch.no_grad():
        if hasattr(model, "encode_texts"):
            texts = model.encode_texts(inputs["ids"], torch.ones_like(inputs["ids"]))
            found[folder.name] = [model.encode_regions(inputs["pixels"], inputs["boxes"]), texts]
        else:
            regions = {"boxes": inputs["boxes"], "region_counts": inputs["counts"]} if code else {}
            output = model(inputs["pixels"], output_hidden_states=True, **regions)
            regions = [output.region_embeds] if code else []
            found[folder.name] = [output.last_hidden_state, *output.hidden_states, *regions]
    block = re.search(r"```python\\n(.*?)```", (folder / "README.md").read_text(), re.S)[1]
    exec(block.replace('source = "."', f"source = {str(folder)!r}"), {"__name__": "card"})
torch.save(found, root / "found.pt")
"""


def towers(native, native_pair) -> dict[str, torch.nn.Module]:
    """One of each kind, with what is special about some: registers, a headless SigLIP, merged tokens."""
    mlcd = native("mlcd")
    rice = RiceVisionModel(RiceVisionConfig.from_native(mlcd.config, num_region_layers=3))
    rice.load_state_dict(mlcd.state_dict())
    cloc = ClocVisionModel.from_native(native("mlcd"), projection_dim=24, prompter_heads=2)
    text = {"vocab_size": 20, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    text_config = CLIPTextConfig(**text, num_attention_heads=2, max_position_embeddings=8, eos_token_id=3)
    return {
        "rice": rice,
        "roi": RoiVisionModel.from_native(native("dinov3"), roi_size=3),
        "cloc_tower": cloc,
        "umg_clip_tower": UmgClipVisionModel.from_native(native("clip")),
        "umg_clip_map": UmgClipVisionModel.from_native(native("siglip"), reduce_after=2),
        "cloc": ClocModel(ClocConfig(vision_config=cloc.config, text_config=text_config)),
        "umg_clip": UmgClipModel.from_pair(native_pair("siglip")),
    }


@torch.no_grad()
def numbers(model, inputs) -> list[torch.Tensor]:
    if hasattr(model, "encode_texts"):
        texts = model.encode_texts(inputs["ids"], torch.ones_like(inputs["ids"]))
        return [model.encode_regions(inputs["pixels"], inputs["boxes"]), texts]
    output = model(inputs["pixels"], inputs["boxes"], inputs["counts"], output_hidden_states=True)
    return [output.last_hidden_state, *output.hidden_states, output.region_embeds]


def test_equal_numbers_and_a_card_that_runs_without_this_package(native, native_pair, noise_image, tmp_path):
    inputs = {
        "pixels": torch.randn(2, 3, 56, 56),
        "boxes": BOXES,
        "counts": torch.tensor([2, 1]),
        "ids": torch.tensor([[0, 5, 6, 7, 8, 9, 10, 3], [0, 7, 7, 7, 7, 7, 7, 3]]),
    }
    expected = {}
    for name, model in towers(native, native_pair).items():
        model.eval().save_pretrained(tmp_path / "saved" / name)
        export_remote_code(tmp_path / "saved" / name, tmp_path / "exported" / name)
        expected[name] = numbers(model, inputs)
    export_native(tmp_path / "saved" / "rice", tmp_path / "exported" / "native")
    expected["native"] = expected["rice"][:-1]
    torch.save(inputs, tmp_path / "inputs.pt")

    without = tmp_path / "without"
    without.mkdir()
    (without / "regiontower.py").write_text('raise ImportError("made unimportable for this run")\n')
    noise_image().save(tmp_path / "picture.jpg")
    settings = os.environ | {"PYTHONPATH": str(without), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    run = subprocess.run(
        [sys.executable, "-c", READER, str(tmp_path)],
        cwd=tmp_path, env=settings, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    found = torch.load(tmp_path / "found.pt")
    assert found.keys() == expected.keys()
    for name, tensors in expected.items():
        assert len(found[name]) == len(tensors), name
        assert all(map(torch.equal, found[name], tensors)), name
        assert all(tensor.abs().max() > 0 for tensor in tensors), name


def test_the_folder_holds_one_file_of_code_and_opens_with_this_package_too(native, tmp_path):
    tower = RoiVisionModel.from_native(native("clip"))
    tower.save_pretrained(tmp_path / "saved")
    out = export_remote_code(tmp_path / "saved", tmp_path / "out")
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md", "config.json", "model.safetensors", "modeling_roi_vision_model.py", "preprocessor_config.json",
    ]  # fmt: skip
    assert json.loads((out / "config.json").read_text())["auto_map"] == {
        "AutoConfig": "modeling_roi_vision_model.RoiVisionConfig",
        "AutoModel": "modeling_roi_vision_model.RoiVisionModel",
    }
    text = (out / "modeling_roi_vision_model.py").read_text()
    assert not re.search(r"^\s*(from|import)\s+[.r](egiontower)?\b", text, re.M) and "class RiceVisionModel" not in text
    for found in (load_tower(out), AutoModel.from_pretrained(out, trust_remote_code=True)):
        assert type(found) is RoiVisionModel  # the code that is installed goes first
        state = found.state_dict()
        assert all(torch.equal(state[name], value) for name, value in tower.state_dict().items())


def test_a_native_vit_gets_a_readout_and_a_full_folder_is_refused(native, tmp_path):
    native("dinov2").save_pretrained(tmp_path / "saved")
    out = export_remote_code(tmp_path / "saved", tmp_path / "out", repo_id="someone/eye", license="mit")
    assert json.loads((out / "config.json").read_text())["model_type"] == "roi_vision_model"
    assert "license: mit" in (out / "README.md").read_text()
    for export in (export_remote_code, export_native):
        with pytest.raises(UserError, match="is not empty"):
            export(tmp_path / "saved", out)
        with pytest.raises(UserError, match=r"no (model|tower) can be opened"):
            export(tmp_path / "nothing", tmp_path / "new")


def test_a_pair_brings_its_tokenizer_and_is_refused_without_all_tensors(native_pair, tiny_tokenizer, tmp_path):
    for part in (UmgClipModel.from_pair(native_pair("clip")), tiny_tokenizer):
        part.save_pretrained(tmp_path / "saved")
    out = export_remote_code(tmp_path / "saved", tmp_path / "out")
    assert AutoTokenizer.from_pretrained(out)("a star").input_ids == tiny_tokenizer("a star").input_ids

    weights = load_file(tmp_path / "saved" / "model.safetensors")
    del weights["image_projection.weight"]
    save_file(weights, tmp_path / "saved" / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="lacks 1 tensors"):
        export_remote_code(tmp_path / "saved", tmp_path / "new")


def test_a_class_of_another_package_is_refused():
    class Stranger:
        __module__ = "elsewhere.towers"

    with pytest.raises(UserError, match=r"Stranger is of elsewhere\.towers"):
        registering({"AutoConfig": Stranger})
