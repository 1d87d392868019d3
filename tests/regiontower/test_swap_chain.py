"""A swapped model through the command: `swap` -> `align` -> `instruct` -> `chat --box`."""

import json
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file

from regiontower.benchmarks import _tiny_llavas
from regiontower.benchmarks._tiny_llavas import save_as, tiny_llava, tiny_tower
from regiontower.cli import main
from regiontower.mllm.checkpoint import memory_name
from regiontower.train_stages.record_io import read_records
from regiontower.train_stages.scenes import write_scenes

TRAIN = {"batch_size": 2, "threads": 1, "seed": 1, "save_steps": 100, "log_steps": 1}
PARTS = {
    "tower": "model.vision_tower.",
    "projector": ("model.multi_modal_projector.", "model.image_newline"),
    "region_projector": "model.region_projector.",
    "language_model": ("model.language_model.", "lm_head."),
}


@pytest.fixture
def run(monkeypatch, capsys):
    """`run(*arguments)` -> what the command reports."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["regiontower", *map(str, arguments), "--json"])
        with pytest.raises(SystemExit) as stopped:
            main()
        output, said = capsys.readouterr()
        assert stopped.value.code == 0, said
        return json.loads(output.strip().splitlines()[-1])

    return call


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return write_scenes(tmp_path_factory.mktemp("scenes"), 6, 0, preset="easy", progress=False)


def recipe(folder, scenes, model, steps=3, **rates):
    data = {"records": str(scenes), "turns": 2, "mix": {"classify": 1}}
    blocks = {"model": {"mllm": str(model)}, "data": data, "train": TRAIN | {"steps": steps}, "lr": rates}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(blocks))
    return path


def tensors_of(folder):
    """Of a plain or lifted model, by one name: a readout wraps the native tower."""
    held = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    return {memory_name(name).replace("vision_tower.tower.", "vision_tower."): tensor for name, tensor in held.items()}


def moved(before, after) -> set[str]:
    """The parts of a model whose tensors differ between two folders; tensors of the first are in the second."""
    old, new = tensors_of(before), tensors_of(after)
    names = [name for name in old if not torch.equal(old[name], new[name])]
    return {part for part, prefixes in PARTS.items() if any(name.startswith(prefixes) for name in names)}


@pytest.mark.parametrize("kind", ["Llava", "LlavaNext"])
def test_swap_with_regions_align_instruct_and_chat_about_a_box(kind, run, scenes, tmp_path, noise_image, monkeypatch):
    kinds = {region.category for record in read_records(scenes).records for region in record.regions}
    monkeypatch.setattr(_tiny_llavas, "WORDS", [*_tiny_llavas.WORDS, *sorted(kinds)])  # so that answers are words
    tiny_tower("RICE").save_pretrained(tmp_path / "rice")
    llava = save_as(*tiny_llava(kind), tmp_path / "llava", "v4", 2)
    swapped, aligned, tuned = (tmp_path / name for name in ("swapped", "align", "instruct"))
    report = run("swap", llava, "--tower", tmp_path / "rice", "--out", swapped, "--regions", "--verify", "bytes")
    assert report["to_train"] == ["multi_modal_projector", "region_projector"] and len(report["commands"]) == 2

    run("align", recipe(tmp_path, scenes, swapped), "--out", aligned, "--device", "cpu")
    assert moved(swapped, aligned) == {"projector", "region_projector"}
    rates = {"tower": 1e-4, "language_model": 1e-2}
    run("instruct", recipe(tmp_path, scenes, aligned, steps=30, **rates), "--out", tuned, "--device", "cpu")
    assert moved(aligned, tuned) == set(PARTS)

    noise_image(130, 90).save(tmp_path / "picture.png")
    for box in ("5,5,30,30", "60,30,120,80"):
        said = run("chat", tmp_path / "picture.png", "Name", "--model", tuned, "--box", box, "--device", "cpu")
        assert said["answer"].split()[0] in kinds  # what it was taught to answer


@pytest.mark.parametrize(("kind", "tower_lr"), [("Llava", 0.0), ("Llava", 1e-3), ("LlavaNext", 1e-3)])
def test_the_tower_of_a_swapped_plain_model_does_what_the_recipe_says(kind, tower_lr, run, scenes, tmp_path):
    """`align` and `instruct` take what `swap` writes without --regions: they add the regions themselves."""
    tiny_tower("SigLIP").save_pretrained(tmp_path / "tower")
    llava = save_as(*tiny_llava(kind), tmp_path / "llava", "v5", 1)
    swapped, aligned, tuned = (tmp_path / name for name in ("swapped", "align", "instruct"))
    run("swap", llava, "--tower", tmp_path / "tower", "--out", swapped, "--verify", "bytes")
    tower = {"tower": tower_lr} if tower_lr else {}

    run("align", recipe(tmp_path, scenes, swapped, **tower), "--out", aligned, "--device", "cpu")
    assert moved(swapped, aligned) == {"projector", *tower}
    run("instruct", recipe(tmp_path, scenes, aligned, **tower), "--out", tuned, "--device", "cpu")
    assert ("tower" in moved(aligned, tuned)) == bool(tower_lr)
    stage = json.loads((tuned / "stage.json").read_text())
    trainable = {row["part"]: row["trainable"] for row in stage["parts"]}
    assert bool(trainable["tower"]) == bool(tower_lr) and trainable["projector"] > 0
