"""LoRA, DoRA and QLoRA through `instruct`: where adapters sit, what moves, what resumes, what is refused."""

from __future__ import annotations

import json
import os
import re
import signal

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import TrainerCallback

from regiontower.mllm import RegionLlavaForConditionalGeneration
from regiontower.mllm.adapters import has_adapter
from regiontower.train_stages.engine import StageInterrupted
from regiontower.train_stages.lora import LoraRecipe, add_lora, exact_pattern, linear_layers
from regiontower.train_stages.mllm_stage import InstructRecipe, instruct
from regiontower.train_stages.recipe import load_recipe
from regiontower.train_stages.scenes import write_scenes
from regiontower.vision_towers import UserError

TRAIN = {"steps": 4, "batch_size": 2, "threads": 1, "log_steps": 1, "save_steps": 2}
RATES = {"projector": 1e-3, "region_projector": 1e-3, "language_model": 1e-2}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return write_scenes(tmp_path_factory.mktemp("scenes"), 8, 0, preset="easy", progress=False)


def recipe(mllm, scenes, *, quant="none", lr=RATES, lora=None, **train) -> InstructRecipe:
    return load_recipe(
        {
            "model": {"mllm": str(mllm), "quant": quant},
            "data": {"records": str(scenes), "turns": 2, "cache_dir": str(scenes.parent / "pixels")},
            "lr": lr,
            "lora": {"rank": 4, "alpha": 8, "dropout": 0.1} if lora is None else lora,
            "train": TRAIN | train,
        },
        InstructRecipe,
    )


def adapter_of(run_dir) -> dict[str, torch.Tensor]:
    return load_file(run_dir / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def tuned(tiny_mllm_dir, scenes, tmp_path_factory):
    return instruct(recipe(tiny_mllm_dir, scenes), tmp_path_factory.mktemp("runs") / "lora", device="cpu").run_dir


def test_complaint_5_the_tower_gets_no_adapter_unless_it_is_asked_for(make_tiny_mllm):
    """LLaVA #1647: short names such as `q_proj` stand in the tower as well."""
    model, _ = make_tiny_mllm()
    assert any(name.endswith("vision_tower.encoder.layers.0.self_attn.q_proj") for name, _ in model.named_modules())
    layers = add_lora(model, LoraRecipe(rank=2, modules=("q_proj", "v_proj")))
    adapted = {name for name, _ in model.named_parameters() if ".lora_" in name}
    assert len(layers) == 4 and len(adapted) == 8
    assert all(name.startswith("model.language_model.layers.") for name in [*layers, *adapted])

    both, _ = make_tiny_mllm()
    add_lora(both, LoraRecipe(rank=2, on=("language_model", "tower"), modules=("q_proj",)))
    adapted = {name for name, _ in both.named_parameters() if ".lora_" in name}
    assert {name.split(".")[1] for name in adapted} == {"language_model", "vision_tower"}
    assert not any("projector" in name or "lm_head" in name for name in adapted)


def test_the_pattern_fits_the_listed_layers_and_no_other(tiny_mllm):
    model, _ = tiny_mllm
    layers = linear_layers(model, "model.language_model")
    assert len(layers) == 2 * 7
    pattern = exact_pattern(layers)
    assert {name for name, _ in model.named_modules() if re.fullmatch(pattern, name)} == set(layers)
    with pytest.raises(UserError, match=r"lora\.modules names q_prj; model\.language_model has down_proj"):
        linear_layers(model, "model.language_model", ["q_prj"])


def test_layers_that_torch_reads_without_calling_are_left_out():
    model = nn.Module()
    model.model = nn.Module()
    model.model.vision_tower = nn.Module()
    model.model.vision_tower.head = nn.MultiheadAttention(4, 2)
    model.model.vision_tower.fc = nn.Linear(4, 4)
    assert linear_layers(model, "model.vision_tower") == ["model.vision_tower.fc"]


def test_a_fresh_adapter_changes_nothing(make_tiny_mllm, tiny_mllm):
    model, _ = make_tiny_mllm()
    ids = torch.arange(30, 50)[None]  # no placeholders
    before = model(input_ids=ids).logits
    for lora in (LoraRecipe(rank=2), LoraRecipe(rank=2, dora=True)):
        other, _ = make_tiny_mllm()
        add_lora(other, lora)
        torch.testing.assert_close(other.eval()(input_ids=ids).logits, before, rtol=1e-5, atol=1e-5)


def test_lora_trains_adapters_and_projectors_and_leaves_the_base_alone(tuned, tiny_mllm_dir):
    stage = json.loads((tuned / "stage.json").read_text())
    trainable = {row["part"]: row["trainable"] for row in stage["parts"]}
    assert trainable["tower"] == trainable["language_model"] == 0
    assert trainable["language_model.lora"] > 0 and trainable["projector"] > 0
    assert stage["audit"]["moved"]["language_model.lora"] > 0
    assert not (tuned / "model.safetensors").exists() and not (tuned / "config.json").exists()

    state = adapter_of(tuned)
    whole = {name.removeprefix("base_model.model.") for name in state if ".lora_" not in name}
    assert {name.split(".")[1] for name in whole} == {"multi_modal_projector", "region_projector"}
    base = dict(RegionLlavaForConditionalGeneration.from_pretrained(tiny_mllm_dir).named_parameters())
    moved = [name for name in whole if not torch.equal(base[name], state[f"base_model.model.{name}"])]
    assert len(moved) >= 0.7 * len(whole)
    up = [tensor for name, tensor in state.items() if "lora_B" in name]
    assert len(up) == 14 and all(tensor.any() for tensor in up)
    # A checkpoint holds what trains and nothing else.
    saved = load_file(tuned / "checkpoints" / "step_4" / "model.safetensors")
    assert not any("vision_tower" in name or "base_layer" in name or "embed_tokens" in name for name in saved)
    assert len(saved) == len(state)


@pytest.mark.parametrize("quant", ["none", "nf4"])
def test_complaint_9_a_resumed_adapter_equals_the_straight_one(tuned, tiny_mllm_dir, scenes, tmp_path, quant):
    """LLaVA #1496, #1200: resuming LoRA lost the adapter or the projector. Here with dropout, to the bit."""

    class StopInStep3(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:  # noticed in the next step
                os.kill(os.getpid(), signal.SIGTERM)

    if quant != "none":
        pytest.importorskip("bitsandbytes")
        tuned = instruct(recipe(tiny_mllm_dir, scenes, quant=quant), tmp_path / "straight", device="cpu").run_dir
    again = recipe(tiny_mllm_dir, scenes, quant=quant)
    with pytest.raises(StageInterrupted):
        instruct(again, tmp_path / "run", device="cpu", callbacks=[StopInStep3()])
    resumed = instruct(again, tmp_path / "run", device="cpu").run_dir
    straight, found = adapter_of(tuned), adapter_of(resumed)
    assert straight.keys() == found.keys()
    assert all(torch.equal(straight[name], found[name]) for name in straight)


def test_dora_and_an_adapted_tower(tiny_mllm_dir, scenes, tmp_path):
    lora = {"rank": 2, "dora": True, "on": ["language_model", "tower"], "modules": ["q_proj", "v_proj"]}
    chosen = recipe(tiny_mllm_dir, scenes, lora=lora, lr=RATES | {"tower": 1e-2}, steps=2)
    run = instruct(chosen, tmp_path / "run", device="cpu").run_dir
    state = adapter_of(run)
    vectors = [name for name in state if name.endswith("lora_magnitude_vector")]
    assert {name.split(".")[3] for name in vectors} == {"language_model", "vision_tower"}
    assert json.loads((run / "stage.json").read_text())["audit"]["moved"]["tower.lora"] > 0


@pytest.mark.parametrize("quant", ["nf4", "int8"])
def test_complaint_12_qlora_keeps_tower_and_projectors_in_full_precision(tiny_mllm_dir, scenes, tmp_path, quant):
    """LLaVA #1712, #785, #1519: a 4-bit projector of shape 2097152 x 1, dtype errors in the tower."""
    pytest.importorskip("bitsandbytes")
    run = instruct(recipe(tiny_mllm_dir, scenes, quant=quant, steps=2), tmp_path / "run", device="cpu").run_dir
    dtypes = {row["part"]: row["dtype"] for row in json.loads((run / "stage.json").read_text())["parts"]}
    assert dtypes["tower"] == dtypes["projector"] == dtypes["region_projector"] == "float32"
    assert dtypes["language_model"] == ("float32+uint8" if quant == "nf4" else "float32+int8")
    base = dict(RegionLlavaForConditionalGeneration.from_pretrained(tiny_mllm_dir).named_parameters())
    for name, tensor in adapter_of(run).items():
        if "projector" in name:
            assert tensor.shape == base[name.removeprefix("base_model.model.")].shape
            assert tensor.dtype == torch.float32


def test_what_cannot_train_is_one_sentence(tiny_mllm_dir, scenes, tmp_path):
    with pytest.raises(UserError, match=r"lora\.on names language_model and lr\.language_model is 0"):
        instruct(recipe(tiny_mllm_dir, scenes, lr=RATES | {"language_model": 0}), tmp_path / "a", device="cpu")
    plain = load_recipe(
        {
            "model": {"mllm": str(tiny_mllm_dir), "quant": "nf4"},
            "data": {"records": str(scenes)},
            "lr": RATES,
            "train": TRAIN,
        },
        InstructRecipe,
    )
    with pytest.raises(UserError, match=r"model\.quant is nf4, and weights in so few bits cannot train"):
        instruct(plain, tmp_path / "b", device="cpu")
    both = recipe(tiny_mllm_dir, scenes, quant="int8", lora={"dora": True})
    with pytest.raises(UserError, match=r"lora\.dora does not work on int8 weights"):
        instruct(both, tmp_path / "c", device="cpu")
    with pytest.raises(UserError, match="each once"):
        load_recipe({"on": []}, LoraRecipe)


def test_a_model_without_a_lora_block_has_no_adapter(tiny_mllm):
    assert not has_adapter(tiny_mllm[0])
