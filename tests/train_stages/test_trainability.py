"""What each packaged recipe of align and instruct trains: the table in docs/tuning.md, `requires_grad`, and weights."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM, TrainerCallback

from regiontower.benchmarks._tiny_llavas import tiny_llava, tiny_tower
from regiontower.mllm import add_regions, load_mllm, swap_vision_tower
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


# ---- runs ----

# As the recipes are, but for the names of large models and of their sizes.
MODELS = {
    "openai/clip-vit-large-patch14-336": "small/clip",
    "lmsys/vicuna-7b-v1.5": "small/llama",
    "DeepGlint-AI/rice-vit-large-patch14-560": "small/rice",
    "Qwen/Qwen3-4B-Instruct-2507": "small/qwen3",
    "HuggingFaceTB/SmolLM2-135M-Instruct": "small/llama",
}
STEPS = ("steps=2", "epochs=null", "batch_size=2", "grad_accum=1", "workers=0", "compile=false", "threads=1")
# Runs that other recipes name in another way than by their recipe.
RUNS = {
    "align-nano": "align",
    "instruct-nano-single": "single",
    "instruct-nano-easy": "easy",
    "instruct-nano": "instruct",
    "instruct-nano-named": "named",
}
PICTURES = 8


def run_of(name: str) -> str:
    return f"runs/{RUNS.get(name, name)}"


MAKERS = {run_of(name): name for name in NAMES}


def small(name: str, *more: str):
    """The recipe for two steps on small models of the same classes."""
    model, overrides = read(name).model, [f"train.{size}" for size in (*STEPS, "log_steps=1")]
    for key in ("tower", "language_model"):
        if (hub := getattr(model, key, None)) in MODELS:
            overrides.append(f"model.{key}={MODELS[hub]}")
    if getattr(model, "image_size", None):
        overrides.append("model.image_size=56")
    return read(name, *overrides, *more)


def save(folder: Path, *parts) -> None:
    for part in parts:
        part.save_pretrained(folder)


def write_models(make_tiny_mllm, tiny_parents: Path) -> None:
    """Those that recipes begin with, in the working directory."""
    save(Path("small/clip"), tiny_tower("CLIP"))
    save(Path("small/rice"), tiny_tower("RICE"))
    save(Path("runs/rice-next"), *add_regions(*swap_vision_tower(*tiny_llava("LlavaNext"), tiny_tower("RICE"))))
    Path("small/llama").symlink_to(tiny_parents / "lm")
    # nano's own classes, as stages 0 and 0b leave them.
    nano, processor = make_tiny_mllm(language="gemma3")
    save(Path("runs/tower"), nano.model.vision_tower)
    language_model = AutoModelForCausalLM.from_config(nano.config.text_config)
    language_model.model.load_state_dict(nano.model.language_model.state_dict())
    save(Path("runs/lm"), language_model, processor.tokenizer)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": True}
    qwen3 = Qwen3ForCausalLM(Qwen3Config(**sizes, vocab_size=len(processor.tokenizer)))
    save(Path("small/qwen3"), qwen3, processor.tokenizer)


def as_xywh(record: dict) -> dict:
    """A region record in the layout of `xywh_jsonl`."""
    regions = []
    for region in record["regions"]:
        x0, y0, x1, y1 = region["box_xyxy"]
        texts = [{"text": text} for text in region.get("texts", [])]
        about = {"bbox": [x0, y0, x1 - x0, y1 - y0], "expressions": texts, "text": region.get("ocr")}
        regions.append(about | {"category": region.get("category")})
    return {key: record[key] for key in ("image", "width", "height")} | {"regions": regions}


def as_conversation(record: dict, number: int) -> dict:
    """Every fourth without a picture."""
    mark, image = ("", {}) if number % 4 == 3 else ("<image>\n", {"image": record["image"]})
    turns = [f"{mark}What is in the picture?", "a red star", "Where is it?", "on the blue " * (1 + number)]
    speakers = ("human", "gpt") * 2
    talk = [{"from": speaker, "value": text} for speaker, text in zip(speakers, turns, strict=True)]
    return {"id": str(number)} | image | {"conversations": talk}


def write_data(scenes: Path) -> None:
    """Every file that a recipe names, in the working directory, in its format."""
    records = [json.loads(line) for line in scenes.read_text(encoding="utf-8").splitlines()]
    kinds = {
        "records": records,
        "xywh_jsonl": [as_xywh(record) for record in records],
        "conversations": [as_conversation(record, number) for number, record in enumerate(records)],
    }
    for name in NAMES:
        data = read(name).data
        for source in getattr(data, "sources", (data,)):
            for path in source.paths():
                path.parent.mkdir(parents=True, exist_ok=True)
                items = [json.dumps(item) for item in kinds[source.format]]
                path.write_text(f"[{', '.join(items)}]" if path.suffix == ".json" else "\n".join(items))
                images = Path(source.root or path.parent, "images")
                if not images.exists():
                    images.symlink_to(scenes.parent / "images")


class Start(TrainerCallback):
    """The weights before the first step."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.fixture(scope="module")
def ran(make_tiny_mllm, tiny_parents, tmp_path_factory):
    """`ran(name)`: the run of a recipe, after those it goes on from, and the weights that it began with. The working
    directory is one in which all that recipes name is there."""
    scenes = write_scenes(tmp_path_factory.mktemp("scenes"), PICTURES, 0, progress=False)
    done: dict[str, Start] = {}

    def run(name: str) -> tuple[Path, dict[str, torch.Tensor]]:
        if name not in done:
            recipe = small(name)
            before = MAKERS.get(getattr(recipe.model, "mllm", ""))
            if before is not None:
                run(before)
            done[name] = Start()
            stage = align if name.startswith("align") else instruct
            stage(recipe, run_of(name), device="cpu", callbacks=[done[name]])
        return Path(run_of(name)), done[name].weights

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("recipes"))
        write_models(make_tiny_mllm, tiny_parents)
        write_data(scenes)
        yield run


def wrong(words: dict[str, str], start: dict[str, torch.Tensor], end: dict[str, torch.Tensor]) -> list[str]:
    """Parts whose weights moved otherwise than `words` say."""
    found = []
    for part, prefixes in PARTS.items():
        mine = {n for n in start if any(n == p or n.startswith(p + ".") for p in prefixes)}
        moved = {n for n in mine if not torch.equal(start[n], end[n])}
        if words[part] == "frozen":
            right = not moved
        elif words[part].startswith("LoRA"):  # its second matrix begins at zero, and is what moves first
            right = {n for n in mine if ".lora_B." in n} <= moved <= {n for n in mine if ".lora_" in n} and moved
        elif part.endswith("projector"):
            right = moved == mine
        else:  # behind the feature layer nothing hangs on the image tokens
            right = len(moved) >= 0.6 * len(mine)
        found += [] if right else [part]
    return found


@pytest.mark.parametrize("name", NAMES)
def test_weights_move_where_the_table_says_and_nowhere_else(name, ran):
    words = words_of(name)
    run, start = ran(name)
    stage = json.loads((run / "stage.json").read_text())
    for row in stage["parts"]:
        expected = 0 if words.get(row["part"], "").startswith(("frozen", "LoRA")) else row["parameters"]
        assert row["trainable"] == expected, row["part"]
    model, _ = load_mllm(run, device="cpu")
    end = dict(model.named_parameters())
    assert end.keys() == start.keys() and wrong(words, start, end) == []
    # And the check can fail, for every part that the table names:
    assert wrong(words, start, start) == [part for part in PARTS if words[part] != "frozen"]
    other = {n: weight + 1 for n, weight in start.items()}
    assert {part for part in PARTS if words[part] == "frozen"} <= set(wrong(words, start, other))


def test_complaint_4_an_unfrozen_tower_trains_at_its_own_rate(ran):
    """LLaVA #1537 (a forgotten no_grad), TinyLLaVA #185 (a rate of its own that nobody read)."""
    recipe = small("instruct-rice-next")
    run, start = ran("instruct-rice-next")
    model, _ = load_mllm(run, device="cpu")
    groups = parameter_groups(model, tuned_parts(model, asdict(recipe.lr), LayerDecay()), 0.0)
    rates = {"tower": 2e-6, "projector": 1e-5, "language_model": 1e-5}
    assert {group["part"]: group["lr"] for group in groups} == rates
    row = json.loads((run / "log.jsonl").read_text().splitlines()[0])
    assert row["lr"]["language_model"] > 0
    assert row["lr"]["tower"] == pytest.approx(row["lr"]["language_model"] / 5)
    audit = json.loads((run / "stage.json").read_text())["audit"]
    # Behind the feature layer nothing hangs on the image tokens; all that comes before must get a gradient.
    silent = {name for name in audit["no_gradient"] if "vision_tower" in name}
    blocks = {name.split(".layers.")[1].split(".")[0] for name in start if ".layers." in name and "vision" in name}
    last = max(map(int, blocks))
    assert all(f".layers.{last}." in name or "post_layernorm" in name for name in silent)
    assert audit["moved"]["tower"] >= 0.6 * audit["trained"]["tower"]


def test_complaint_8_the_next_stage_takes_the_run_directory_of_the_one_before(ran, tmp_path):
    """LLaVA-NeXT #145, #353: where is mm_projector.bin, and what loads it? A run is one checkpoint with all parts."""
    first, _ = ran("align-nano")
    handed = small("instruct-nano-single", "lr.projector=0", "lr.region_projector=0")
    second = instruct(handed, tmp_path / "instruct", device="cpu").run_dir
    before, after = (load_file(folder / "model.safetensors") for folder in (first, second))
    projectors = [name for name in before if "projector" in name]
    assert len(projectors) >= 8 and all(torch.equal(before[name], after[name]) for name in projectors)
    parent = json.loads((second / "stage.json").read_text())["parents"]["mllm"]
    assert parent["path"] == str(first) and parent["stage"]["stage"] == "align"


def test_a_whole_model_goes_on_from_a_lora_run(ran, tmp_path):
    """The adapter is merged first; nobody has to do it by hand."""
    lora, _ = ran("instruct-llava15-lora")
    whole = instruct(small("instruct-llava15", f"model.mllm={lora}"), tmp_path / "whole", device="cpu").run_dir
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
