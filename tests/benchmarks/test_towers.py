"""The comparison of towers: its arms are recipes that differ, all of it runs small, and its means are means."""

import json

import pytest

from regiontower.benchmarks import towers
from regiontower.benchmarks._tower_arms import ABLATIONS, ARMS, COMMON, MAIN, SIGNS, Sign
from regiontower.benchmarks.towers import averaged, signs
from regiontower.train_stages.pretrain_recipe import PretrainRecipe
from regiontower.train_stages.recipe import load_recipe
from regiontower.vision_towers.errors import UserError


def recipe_of(name):
    arm = ARMS[name]
    values = {**COMMON, "data.tokenizer": "t", "data.records": "r", **arm.changes}
    return load_recipe(arm.recipe, PretrainRecipe, [f"{key}={json.dumps(value)}" for key, value in values.items()])


@pytest.mark.parametrize("name", ARMS)
def test_every_arm_is_a_recipe_on_the_same_tower(name):
    recipe, first = recipe_of(name), recipe_of("clip")
    assert recipe.model.tower is None
    assert recipe.model.size == first.model.size and recipe.data.augment == first.data.augment
    for key in ("optimizer", "muon_lr", "weight_decay", "betas", "warmup", "precision"):
        assert getattr(recipe.train, key) == getattr(first.train, key)
    assert recipe.lr == first.lr and ARMS[name].ablation == (name not in MAIN)


def test_clip_is_told_of_whole_images_and_its_twin_of_views():
    assert recipe_of("clip").data.captions == "image" and recipe_of("clip_views").data.captions == "visible"


def test_an_ablation_differs_in_what_it_says():
    recipes = {name: recipe_of(name) for name in ABLATIONS}
    assert all(recipes[a] != recipes[b] for a in recipes for b in recipes if a < b)
    loss = {name: recipe.model.umg_clip.loss for name, recipe in recipes.items()}
    alone = loss["umg_clip_image_only"]
    assert (alone.region_caption, alone.region_tag, alone.pixel_caption, alone.pixel_tag) == (0, 0, 0, 0)
    assert alone.image_caption > 0 and loss["umg_clip_no_region"].pixel_tag > 0
    assert (
        recipes["rice_no_ocr"].data.tokenizer is None and recipes["cloc_no_filter"].model.cloc.loss.same_above is None
    )
    assert [recipes[f"rice_n{count}"].data.regions_per_image for count in (1, 5, 10, 20)] == [1, 5, 10, 20]
    assert recipes["cloc_roi_align"].model.cloc.region_pool == "roi_align"


def test_every_sign_is_of_arms_and_readouts_that_are_there():
    for sign in SIGNS:
        assert sign.readout in ARMS[sign.arm].readouts and sign.other_readout in ARMS[sign.other].readouts
        assert ARMS[sign.arm].ablation == ARMS[sign.other].ablation and sign.figure in towers.FIGURES


def test_means_and_intervals():
    rows = [{"own": {"linear": value}} for value in (0.4, 0.5, 0.6)]
    found = averaged(rows)["own"]["linear"]
    assert found["mean"] == pytest.approx(0.5) and found["seeds"] == [0.4, 0.5, 0.6]
    assert found["ci95"] == pytest.approx([0.5 - 0.2484, 0.5 + 0.2484], abs=1e-3)  # t(2) = 4.303, s = 0.1
    assert averaged(rows[:1])["own"]["linear"]["ci95"] is None


def test_signs_are_differences_of_the_same_seeds():
    found = {
        "rice": [{"own": {"linear": value}} for value in (0.5, 0.75)],
        "clip": [{"value": {"linear": value}, "crops": {"linear": 0.9}} for value in (0.4, 0.5)],
    }
    least = Sign("rice", "clip", "linear", "us", 0.15, other_readout="value")
    wanted = [
        least,
        Sign("rice", "clip", "reading_linear", "us", other_readout="value"),
        Sign("rice", "cloc", "knn", ""),
    ]
    (row,) = signs(found, wanted)
    assert row["difference"]["seeds"] == pytest.approx([0.1, 0.25]) and row["difference"]["mean"] == pytest.approx(
        0.175
    )
    assert row["holds"] and row["above"] == "clip" and not row["resolved"]  # two seeds that differ say little
    found["clip"][1]["value"]["linear"] = 0.56
    assert not signs(found, [least])[0]["holds"]
    found["clip"] = [{"value": {"linear": value - 0.2 - rest}} for value, rest in ((0.5, 0), (0.75, 1e-4))]
    (row,) = signs(found, [least])
    assert row["holds"] and row["resolved"]
    found["clip"] = [{"value": {"linear": value - 0.05 - rest}} for value, rest in ((0.5, 0), (0.75, 1e-4))]
    (row,) = signs(found, [least])
    assert not row["holds"] and row["resolved"]


def test_the_tables_say_what_was_found():
    found = {
        "rice": [{"own": {"linear": value}} for value in (0.5, 0.6)],
        "clip": [{"value": {"linear": value}, "crops": {"knn": 0.25}} for value in (0.2, 0.2)],
    }
    table = {name: averaged(rows) for name, rows in found.items()}
    text = towers.written(table, signs(found, [Sign("rice", "clip", "linear", "us", 0.15, other_readout="value")]))
    assert "| arm | read by | linear | knn |" in text and "| clip | crops |  | 25.0 ± 0.0 |" in text
    assert "| rice | own | 55.0 ± 63.5 |  |" in text  # t(1) = 12.706
    assert "| rice | clip | linear | 35.0 ± 63.5 | 15 | yes | no |" in text


def run(capsys, *words):
    towers_main = ["towers", *map(str, words), "--seeds", "1", "--batch-size", "4", "--steps", "2", "--threads", "1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", [*towers_main, "--ablation-share", "0.5", "--lit-steps", "1", "--json"])
        towers.main()
    return json.loads(capsys.readouterr().out.splitlines()[-1])


FEW = ("clip", "rice", "rice_no_ocr", "cloc", "cloc_roi_align", "umg_clip_image_only")


@pytest.mark.parametrize("arms", [FEW, pytest.param(tuple(ARMS), marks=pytest.mark.slow)], ids=["few", "all"])
def test_it_runs_small_and_goes_on_where_it_stopped(capsys, tmp_path, arms):
    scenes = ("--out", tmp_path, "--scenes", "10", "--held-out", "5", "--probe-regions", "30")
    first = run(capsys, *scenes, "--arms", "clip", "rice_no_ocr")
    assert first["steps"] == {"main": 2, "ablations": 1} and set(first["arms"]["clip"]) == {"value", "crops"}
    found = run(capsys, *scenes, "--arms", *arms)
    assert found["arms"]["clip"] == first["arms"]["clip"] and set(found["arms"]) == set(arms)
    assert "reading_tokens" in found["arms"]["rice"]["own"] and "lit_zero_shot" in found["arms"]["rice"]["own"]
    assert not {"reading_tokens", "lit_zero_shot"} & set(found["arms"]["rice_no_ocr"]["own"])
    assert {"zero_shot", "text_to_region_r1"} <= set(found["arms"]["cloc_roi_align"]["own"])
    assert len(found["signs"]) == sum(sign.arm in arms and sign.other in arms for sign in SIGNS) > 1
    assert found["classes"] > 1 and found["held_out"]["rice"]["own"]["linear"] > 0
    assert [set(seconds) for seconds in found["seconds"]["cloc"]] == [{"trained", "probed"}]
    assert (tmp_path / "towers.png").is_file() and not (tmp_path / "runs/rice-0/checkpoints").exists()
    for other in (
        ("--scenes", "10", "--held-out", "5"),
        ("--scenes", "10", "--held-out", "4", "--probe-regions", "30"),
    ):
        with pytest.raises(UserError, match="give a new --out"):
            run(capsys, "--out", tmp_path, "--scenes", "10", *other, "--arms", "clip")


def test_it_runs_on_photographs(capsys, tmp_path, shared_data):
    folder = tmp_path / "data" / "natural"
    folder.mkdir(parents=True)
    (folder / "images").symlink_to(shared_data / "natural" / "images")
    for name in ("train", "val"):
        lines = (shared_data / "natural" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        (folder / f"{name}.jsonl").write_text("\n".join(lines[:12]) + "\n", encoding="utf-8")
    arms = ("rice_short", "rice_no_ocr", "umg_clip_short")
    found = run(capsys, "--out", tmp_path / "out", "--data", folder, "--arms", *arms)
    assert found["data"] == "photographs" and set(found["arms"]) == set(arms) and found["signs"] == []
    assert found["arms"]["umg_clip_short"]["own"]["linear"]["mean"] >= 0
