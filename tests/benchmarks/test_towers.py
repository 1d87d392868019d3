"""The comparison of towers: its arms are recipes that load, and its means are means."""

import json

import pytest

from regiontower.benchmarks.towers import ABLATIONS, ARMS, COMMON, MAIN, averaged
from regiontower.train_stages.pretrain_recipe import PretrainRecipe
from regiontower.train_stages.recipe import load_recipe


@pytest.mark.parametrize("name", ARMS)
def test_every_arm_is_a_recipe(name):
    arm = ARMS[name]
    values = {**COMMON, "data.tokenizer": "t", "data.records": "r", **arm.changes}
    recipe = load_recipe(arm.recipe, PretrainRecipe, [f"{key}={json.dumps(value)}" for key, value in values.items()])
    assert recipe.model.tower is None and recipe.data.view_schedule
    assert arm.share == (1.0 if name in MAIN else 0.1)


def test_an_ablation_differs_from_what_it_is_compared_with():
    for name, arm in ABLATIONS.items():
        others = [other for other in ABLATIONS if other != name]
        assert all((arm.recipe, arm.changes) != (ABLATIONS[o].recipe, ABLATIONS[o].changes) for o in others)


def test_means_and_intervals():
    rows = [{"own": {"linear": value}} for value in (0.4, 0.5, 0.6)]
    found = averaged(rows)["own"]["linear"]
    assert found["mean"] == pytest.approx(0.5) and found["seeds"] == [0.4, 0.5, 0.6]
    assert found["ci95"] == pytest.approx([0.5 - 0.2484, 0.5 + 0.2484], abs=1e-3)  # t(2) = 4.303, s = 0.1
    assert averaged(rows[:1])["own"]["linear"]["ci95"] is None
