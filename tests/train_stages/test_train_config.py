"""The `train` block: what it does not take, in one sentence that names the key."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from regiontower.train_stages.recipe import TrainConfig, load_recipe
from regiontower.vision_towers.errors import UserError


@dataclass
class Recipe:
    train: TrainConfig


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("report_to=[wand]", "train.report_to.0: 'wand' is no tracker of transformers; the nearest is wandb."),
        ("report_to=[wandb, zzz]", "train.report_to.1: 'zzz' is no tracker of transformers; there are azure_ml, "),
        (
            "report_to=tensorboard",
            "train.report_to: a list is needed, such as [tensorboard], and not 'tensorboard'.",
        ),
        ("betas=[1.5, 2]", "train.betas.0 should be less than 1, but it is 1.5."),
        ("betas=[0.9, -1]", "train.betas.1 should be greater than or equal to 0, but it is -1."),
        ("betas=0.9", "train.betas: a list is needed, such as [0.9, 0.999], and not 0.9."),
        ("seed=-1", "train.seed should be greater than or equal to 0, but it is -1."),
        ("seed=4294967296", "train.seed should be less than 4294967296, but it is 4294967296."),
        ("epochs=.inf", "train.epochs should be a finite number, but it is inf."),
    ],
)
def test_values_that_cannot_work(override, sentence):
    with pytest.raises(UserError) as caught:
        load_recipe({"train": {"steps": 1}}, Recipe, [f"train.{override}"])
    assert str(caught.value).startswith(f"recipe: {sentence}") and "\n" not in str(caught.value)


def test_values_at_their_bounds():
    overrides = ["train.betas=[0, 0.999]", "train.seed=4294967295", "train.report_to=[mlflow, tensorboard]"]
    train = load_recipe({"train": {"steps": 1}}, Recipe, overrides).train
    assert (train.betas, train.seed, train.report_to) == ((0.0, 0.999), 2**32 - 1, ("mlflow", "tensorboard"))
