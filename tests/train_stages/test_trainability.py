"""What each packaged recipe of align and instruct trains: the table in docs/tuning.md, `requires_grad`, and weights."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from regiontower.mllm import load_mllm
from regiontower.train_stages.engine import apply_parts
from regiontower.train_stages.engine.layer_decay import layer_factors
from regiontower.train_stages.engine.parts import parameter_groups
from regiontower.train_stages.lora import add_lora
from regiontower.train_stages.mllm_stage import AlignRecipe, InstructRecipe, align, instruct
from regiontower.train_stages.recipe import load_recipe, packaged_recipes
from regiontower.train_stages.scenes import write_scenes
from regiontower.train_stages.tuning import PARTS, LayerDecay, trainability, tuned_parts

DOCS = Path(__file__).resolve().parents[2] / "docs" / "tuning.md"
NAMES = [name for name in packaged_recipes() if name.startswith(("align", "instruct"))]


def read(name: str, *overrides: str):
    return load_recipe(name, AlignRecipe if name.startswith("align") else InstructRecipe, overrides)


def lora_of(recipe):
    return getattr(recipe, "lora", None)


def words_of(name: str) -> dict[str, str]:
    recipe = read(name)
    return trainability(asdict(recipe.lr), recipe.layer_decay, lora_of(recipe))


KINDS = {}  # what trains, whatever the rate -> a recipe that does it: each is run once
for each in NAMES:
    about = tuple((part, word if word == "frozen" else word.split()[0][:4]) for part, word in words_of(each).items())
    trains = tuple((part, "LoRA" if word == "LoRA" else word != "frozen") for part, word in about)
    KINDS.setdefault((each.partition("-")[0], trains), each)


@pytest.mark.parametrize("name", NAMES)
def test_the_table_in_the_docs_says_what_the_recipe_says(name):
    header = "| recipe | tower | projector | region projector | language model |"
    text = DOCS.read_text(encoding="utf-8")
    assert header in text
    row = next((line for line in text.splitlines() if line.startswith(f"| `{name}` |")), None)
    expected = " | ".join([f"`{name}`", *words_of(name).values()])
    assert row == f"| {expected} |", f"docs/tuning.md should hold: | {expected} |"


def test_the_table_has_no_other_recipes():
    lines = DOCS.read_text(encoding="utf-8").splitlines()
    rows = [line for line in lines if line.startswith(("| `align", "| `instruct")) and line.count(" | ") == 4]
    assert len(rows) == len(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_requires_grad_is_what_the_table_says(name, make_tiny_mllm):
    recipe, words = read(name), words_of(name)
    model, _ = make_tiny_mllm()
    if lora_of(recipe) is not None:
        add_lora(model, lora_of(recipe))
    apply_parts(model, tuned_parts(model, asdict(recipe.lr), recipe.layer_decay, lora_of(recipe)))
    for part, prefixes in PARTS.items():
        for path, parameter in model.named_parameters():
            if any(path == prefix or path.startswith(prefix + ".") for prefix in prefixes):
                adapter = ".lora_" in path
                expected = words[part] != "frozen" and (adapter or not words[part].startswith(("LoRA", "DoRA")))
                assert parameter.requires_grad is expected, path


@dataclass(frozen=True)
class Material:
    """A tower and a language model, both together, and scenes."""

    parents: Path
    mllm: Path
    scenes: Path


@pytest.fixture(scope="module")
def material(tiny_parents, tiny_mllm_dir, tmp_path_factory):
    scenes = write_scenes(tmp_path_factory.mktemp("scenes"), 8, 0, preset="easy", progress=False)
    return Material(tiny_parents, tiny_mllm_dir, scenes)


def small(name: str, material: Material, *more: str):
    """The recipe on tiny models and scenes, for two steps. Rates are what is looked at, and tiny models need more."""
    recipe = read(name)
    whole = name.startswith("instruct") or hasattr(recipe.model, "mllm")
    parents = {"mllm": str(material.mllm)}
    if not whole:
        parents = {"tower": str(material.parents / "tower"), "language_model": str(material.parents / "lm")}
    pixels = material.scenes.parent / "pixels"
    data = {"records": str(material.scenes), "turns": 4, "cache_dir": str(pixels)}
    overrides = [f"model={json.dumps(parents)}", f"data={json.dumps(data)}"]
    steps = {"steps": 2, "epochs": None, "batch_size": 4, "grad_accum": 1, "precision": "fp32", "compile": False}
    steps |= {"threads": 1, "workers": 0, "log_steps": 1, "warmup": 0, "schedule": "constant", "weight_decay": 0}
    overrides += [f"train.{key}={json.dumps(value)}" for key, value in steps.items()]
    return read(name, *overrides, *more)


@pytest.mark.parametrize("name", list(KINDS.values()))
def test_weights_move_where_the_table_says_and_nowhere_else(name, material, tmp_path):
    recipe, words = small(name, material), words_of(name)
    stage = align if name.startswith("align") else instruct
    run = stage(recipe, tmp_path / "run", device="cpu").run_dir
    rows = {row["part"]: row for row in json.loads((run / "stage.json").read_text())["parts"]}
    # An align run makes its projectors; what they were before they trained stands in nobody's files.
    made = set() if hasattr(recipe.model, "mllm") else {"projector", "region_projector"}
    before, _ = load_mllm(material.mllm, device="cpu")
    after, _ = load_mllm(run, device="cpu", merge=True)
    start, end = dict(before.named_parameters()), dict(after.named_parameters())
    for part, prefixes in PARTS.items():
        mine = [n for n in start if any(n == p or n.startswith(p + ".") for p in prefixes)]
        moved = [n for n in mine if n not in end or not torch.equal(start[n], end[n])]
        lora = words[part].startswith("LoRA")
        assert rows[part]["trainable"] == (0 if words[part] == "frozen" or lora else rows[part]["parameters"])
        if words[part] == "frozen":
            assert part in made or not moved
        elif lora:  # merged: the linear layers, and nothing but them
            assert moved and all(n.split(".")[-2].endswith("_proj") for n in moved)
        else:
            assert len(moved) >= 0.5 * len(mine), part


def tower_names(model) -> list[str]:
    return [name for name, _ in model.model.vision_tower.named_parameters()]


def test_complaint_4_an_unfrozen_tower_trains_at_its_own_rate(material, tmp_path):
    """LLaVA #1537 (a forgotten no_grad), TinyLLaVA #185 (a rate of its own that nobody read)."""
    recipe = small("instruct-rice-next", material)
    model, _ = load_mllm(material.mllm, device="cpu")
    groups = parameter_groups(model, tuned_parts(model, asdict(recipe.lr), LayerDecay()), 0.0)
    assert {group["part"]: group["lr"] for group in groups} == {
        "tower": 2e-6,
        "projector": 1e-5,
        "language_model": 1e-5,
    }
    run = instruct(recipe, tmp_path / "run", device="cpu").run_dir
    row = json.loads((run / "log.jsonl").read_text().splitlines()[0])
    assert row["lr"]["tower"] == pytest.approx(2e-6) and row["lr"]["language_model"] == pytest.approx(1e-5)
    audit = json.loads((run / "stage.json").read_text())["audit"]
    # Behind the feature layer nothing hangs on the image tokens; all that comes before must get a gradient.
    silent = {name for name in audit["no_gradient"] if "vision_tower" in name}
    blocks = {name.split(".layers.")[1].split(".")[0] for name in tower_names(model) if ".layers." in name}
    last = max(map(int, blocks))
    assert all(f".layers.{last}." in name or "post_layernorm" in name for name in silent)
    assert audit["moved"]["tower"] >= 0.7 * audit["trained"]["tower"]


def test_complaint_8_the_next_stage_takes_the_run_directory_of_the_one_before(material, tmp_path):
    """LLaVA-NeXT #145, #353: where is mm_projector.bin, and what loads it? A run is one checkpoint with all parts."""
    first = align(small("align-nano", material), tmp_path / "align", device="cpu").run_dir
    handed = small("instruct-nano", material, f"model.mllm={first}", "lr.projector=0", "lr.region_projector=0")
    second = instruct(handed, tmp_path / "instruct", device="cpu").run_dir
    before, after = (load_file(folder / "model.safetensors") for folder in (first, second))
    projectors = [name for name in before if "projector" in name]
    assert len(projectors) >= 8 and all(torch.equal(before[name], after[name]) for name in projectors)
    parent = json.loads((second / "stage.json").read_text())["parents"]["mllm"]
    assert parent["path"] == str(first) and parent["stage"]["stage"] == "align"


def test_a_whole_model_goes_on_from_a_lora_run(material, tmp_path):
    """The adapter is merged first; nobody has to do it by hand."""
    lora = instruct(small("instruct-llava15-lora", material), tmp_path / "lora", device="cpu").run_dir
    whole = instruct(small("instruct-nano", material, f"model.mllm={lora}"), tmp_path / "whole", device="cpu").run_dir
    assert (whole / "model.safetensors").is_file() and not (whole / "adapter_config.json").exists()


def test_layer_decay_follows_the_order_of_the_blocks(make_tiny_mllm):
    names = ["embed", "layers.0.w", "layers.0.b", "layers.1.w", "layers.2.w", "norm"]
    assert layer_factors(names, 0.5) == [0.5**4, 0.5**3, 0.5**3, 0.5**2, 0.5, 1.0]
    assert layer_factors(names, 1.0) == layer_factors(["a", "b"], 0.5) * 3 == [1.0] * 6
    model, _ = make_tiny_mllm()
    rates = {"tower": 1e-3, "projector": 1e-2, "region_projector": 1e-2, "language_model": 1e-4}
    groups = parameter_groups(model, tuned_parts(model, rates, LayerDecay(tower=0.5)), 0.1)
    paths = {id(parameter): path for path, parameter in model.named_parameters()}
    rate = {paths[id(parameter)]: group["lr"] for group in groups for parameter in group["params"]}
    tower = "model.vision_tower."
    assert rate[f"{tower}embeddings.patch_embedding.weight"] == pytest.approx(1e-3 * 0.5**5)
    for layer in range(4):
        assert rate[f"{tower}encoder.layers.{layer}.mlp.fc1.weight"] == pytest.approx(1e-3 * 0.5 ** (4 - layer))
    assert {value for path, value in rate.items() if not path.startswith(tower)} == {1e-2, 1e-4}
    assert len(rate) == len(list(model.parameters()))
