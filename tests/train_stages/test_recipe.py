"""Recipes: what is read, what is refused, and in which words."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml

from regiontower.train_stages.recipe import TrainConfig, dump_recipe, load_recipe, packaged_recipes, plain
from regiontower.vision_towers.errors import UserError


@dataclass(frozen=True)
class Source:
    root: Path
    weight: float = 1.0


@dataclass(frozen=True)
class Data:
    sources: list[Source] = field(default_factory=list)
    seed: int = 0


@dataclass(frozen=True)
class Recipe:
    train: TrainConfig
    lr: dict[str, float]
    data: Data | None = None
    note: str | None = None


GOOD = {"train": {"steps": 10, "betas": [0.9, 0.95]}, "lr": {"tower": 0, "projector": "1e-3"}}


def error_of(source, overrides=()) -> str:
    with pytest.raises(UserError) as caught:
        load_recipe(source, Recipe, overrides)
    return str(caught.value)


def test_a_mapping_becomes_typed_blocks():
    recipe = load_recipe(GOOD | {"data": {"sources": [{"root": "a/b"}]}}, Recipe)
    assert recipe.train == TrainConfig(steps=10, betas=(0.9, 0.95))
    assert recipe.lr == {"tower": 0.0, "projector": 1e-3}
    assert recipe.data == Data(sources=[Source(Path("a/b"))])


def test_round_trip_through_a_file(tmp_path):
    recipe = load_recipe(GOOD | {"data": {"sources": [{"root": "x", "weight": 1e-7}]}, "note": "größer: yes"}, Recipe)
    dump_recipe(recipe, tmp_path / "recipe.yaml")
    assert load_recipe(tmp_path / "recipe.yaml", Recipe) == recipe
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


def test_overrides_are_yaml_and_do_not_touch_the_source():
    overrides = ["train.steps=3", "lr.tower=1e-5", "train.betas=[0.8, 0.9]", "data.seed=7", "train.threads=null"]
    recipe = load_recipe(GOOD, Recipe, overrides)
    assert (recipe.train.steps, recipe.train.betas, recipe.train.threads) == (3, (0.8, 0.9), None)
    assert recipe.lr["tower"] == 1e-5
    assert recipe.data == Data(seed=7)
    assert GOOD["train"]["steps"] == 10 and GOOD["lr"]["tower"] == 0


def test_numbers_without_a_dot_are_numbers(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("train: {steps: 5, weight_decay: 1e-2}\nlr: {all: 2E-4}\nnote: 1e\n")
    recipe = load_recipe(path, Recipe)
    assert recipe.train.weight_decay == 0.01 and recipe.lr == {"all": 2e-4} and recipe.note == "1e"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"trian": {}}, ["trian", "did you mean train?"]),
        ({"train": {"steps": 1, "batchsize": 4}}, ["train.batchsize", "did you mean train.batch_size?"]),
        ({"train": {"steps": 1, "zzz": 4}}, ["train.zzz", "known here", "steps"]),
        ({"data": {"sources": [{"root": "a"}, {"rot": "b"}]}}, ["data.sources.1.rot", "data.sources.1.root?"]),
        ({"train": {"steps": "many"}}, ["train.steps", "should be a valid integer", "'many'"]),
        ({"train": {"steps": 0}}, ["train.steps", "greater than 0"]),
        ({"train": {"steps": 1, "optimizer": "lion"}}, ["train.optimizer", "'adamw', 'muon' or 'sgd'", "'lion'"]),
        ({"train": {"batch_size": 4}}, ["train", "one of steps, epochs and minutes"]),
        ({"train": 3}, ["train", "3"]),
        ({"lr": {"tower": "fast"}}, ["lr.tower", "valid number"]),
    ],
)
def test_mistakes_are_one_sentence_with_the_path_of_the_key(change, words):
    message = error_of(GOOD | change)
    assert "\n" not in message and message.startswith("recipe: ")
    for word in words:
        assert word in message


def test_missing_blocks_and_bad_overrides():
    assert "lr is missing" in error_of({"train": {"steps": 1}})
    assert "data.sources.0.root is missing" in error_of(GOOD | {"data": {"sources": [{}]}})
    assert "KEY=VALUE" in error_of(GOOD, ["train.steps"])
    assert "train.steps is a single value" in error_of(GOOD, ["train.steps.x=1"])
    assert "train.step;" in error_of(GOOD, ["train.step=1"])


def test_files_that_are_no_recipe(tmp_path):
    broken = tmp_path / "broken.yaml"
    broken.write_text("train:\n  steps: [1\nlr: {}\n")
    assert "broken.yaml, line" in error_of(broken)
    broken.write_text("- a\n- b\n")
    assert "mapping of blocks" in error_of(broken)
    assert "no such recipe file" in error_of(tmp_path / "absent.yaml")
    assert "neither a file nor a packaged recipe" in error_of("no-such-recipe")


def test_packaged_recipes_are_valid_yaml_and_found_by_name():
    for name in packaged_recipes():
        message = error_of(name, ["no_such_block.x=1"])  # found and read: the complaint is about a key of it
        assert message.startswith(f"{name}.yaml: unknown key")


def test_train_config_needs_an_end():
    with pytest.raises(ValueError, match="one of steps, epochs and minutes"):
        TrainConfig(batch_size=2)
    assert yaml.safe_load(yaml.safe_dump(plain(TrainConfig(minutes=0.5))))["minutes"] == 0.5
