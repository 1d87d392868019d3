"""What `check` finds in recipes."""

import json

import pytest
import yaml
from transformers import AutoProcessor

from regiontower.benchmarks._tiny_llavas import tiny_llava, tiny_tower
from regiontower.mllm import add_regions, swap_vision_tower
from regiontower.train_stages.check_recipe import REGION_KINDS, check_recipe, read_stage_recipe
from regiontower.train_stages.conversation_kinds import KINDS
from regiontower.train_stages.recipe import packaged_recipes
from regiontower.train_stages.scenes import generate_scene
from regiontower.vision_towers import RiceVisionConfig, RiceVisionModel, UserError


@pytest.fixture(scope="module")
def parents(tmp_path_factory):
    """A tower, a plain ViT and a language model's recipe; configurations are all that is read."""
    from transformers import SiglipVisionConfig

    root = tmp_path_factory.mktemp("parents")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    RiceVisionModel(RiceVisionConfig(**sizes, image_size=56, patch_size=14)).config.save_pretrained(root / "rice")
    SiglipVisionConfig(**sizes, image_size=56, patch_size=14).save_pretrained(root / "siglip")
    (root / "lm").mkdir()
    (root / "lm" / "recipe.yaml").write_text(yaml.safe_dump({"data": {"box_format": "square100"}}))
    return root


def findings(parents, tower, *more):
    overrides = [f"model.tower={parents / tower}", f"model.language_model={parents / 'lm'}", *more]
    return " ".join(finding.line() for finding in check_recipe("align-nano", overrides))


def test_a_recipe_that_is_right(parents):
    assert findings(parents, "rice") == ""
    for tower in ("rice", "siglip"):
        assert findings(parents, tower, "lr.tower=1e-5") == ""  # the last blocks learn from regions


@pytest.mark.parametrize(
    ("tower", "more", "said"),
    [
        ("rice", "model.image_size=60", "a multiple of 14"),
        ("siglip", "model.image_size=70", "takes 56 px"),
        ("rice", "model.box_format=qwen2", "the language model learned square100"),
        ("rice", "data.mix={grounding: 1, referring: 0}", "nothing in the data asks about a region"),
        ("rice", "model.region_prompt=overlay", "region_prompt overlay makes no region embeddings"),
        ("siglip", "lr.tower=1e-5;model.region_prompt=coords", "the last 1 blocks of the tower get no gradient"),
        ("rice", "lr.tower=1e-5;model.region_prompt=overlay", "the last 1 blocks of the tower get no gradient"),
        ("siglip", "lr.tower=1e-5;data.mix={grounding: 1}", "the last 1 blocks of the tower get no gradient"),
    ],
)
def test_each_mistake_is_found(parents, tower, more, said):
    assert said in findings(parents, tower, *more.split(";"))


def test_a_whole_model_is_looked_at_in_either_stage(tmp_path):
    """As `swap` writes it, with regions or not; what is wrong with the model is a finding of the recipe."""
    for name, regions in (("plain", False), ("regions", True)):
        pair = swap_vision_tower(*tiny_llava("Llava"), tiny_tower("SigLIP"))
        for part in add_regions(*pair) if regions else pair:
            part.save_pretrained(tmp_path / name)
        whole = f"model={{mllm: {tmp_path / name}}}"
        assert check_recipe("align-real", [whole]) == []
        assert check_recipe("instruct-real", [whole]) == []
        said = " ".join(finding.line() for finding in check_recipe("align-real", [whole, "data.mix={grounding: 1}"]))
        assert "never gets a gradient" in said
    fields = json.loads((tmp_path / "plain" / "config.json").read_text())
    (tmp_path / "plain" / "config.json").write_text(json.dumps(fields | {"vision_feature_select_strategy": "default"}))
    (found, *_) = check_recipe("align-real", [f"model={{mllm: {tmp_path / 'plain'}}}"])
    assert found.level == "error"


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("It is at [0.12, 0.34, 0.56, 0.78].", "boxes as norm01, the model has square100"),
        ("It is at <|box_start|>(12,34),(560,780)<|box_end|>.", "boxes as qwen2"),
        ("It is at [12,34,56,78].", ""),
        ("There are two of them.", ""),
    ],
)
def test_conversations_in_another_box_convention_are_found(parents, tmp_path, answer, said):
    turns = [{"from": "human", "value": "Where is the star?"}, {"from": "gpt", "value": answer}]
    path = tmp_path / "talk.json"
    path.write_text(json.dumps([{"id": str(number), "conversations": turns} for number in range(4)]))
    source = f"{{records: {path}, format: conversations}}"
    records = f"{{records: {tmp_path / 'none.jsonl'}}}"  # is not read
    options = (f"data={{sources: [{source}, {records}]}}", "model.box_format=square100")
    found = findings(parents, "rice", *options)
    assert said in found and bool(said) == ("conventions" in found)


PACKAGED = [name for name in packaged_recipes() if name.startswith(("align", "instruct"))]


@pytest.fixture(scope="module")
def wholes(tmp_path_factory):
    """kind -> folder of a small model with regions, as `swap --regions` writes it."""
    found = {}
    for kind in ("Llava", "LlavaNext"):
        found[kind] = tmp_path_factory.mktemp(kind)
        for part in add_regions(*swap_vision_tower(*tiny_llava(kind), tiny_tower("RICE"))):
            part.save_pretrained(found[kind])
    return found


def test_a_lora_run_is_looked_at_with_its_base(wholes, tmp_path):
    """`instruct` goes on from one, too."""
    AutoProcessor.from_pretrained(wholes["Llava"]).save_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(wholes["Llava"])}))
    whole = f"model={{mllm: {tmp_path}}}"
    assert check_recipe("instruct-real", [whole]) == []
    found = check_recipe("instruct-real", [whole, "data.mix={grounding: 1}"])
    assert found[0].what == "nothing in the data asks about a region"


def test_models_that_our_stages_do_not_train_are_found(tmp_path):
    """`align` and `instruct` refuse them, after they have read the weights."""
    for kind in ("Llava", "LlavaOnevision"):
        for part in tiny_llava(kind):
            part.save_pretrained(tmp_path / kind)

    def said(recipe, kind, *more):
        found = check_recipe(recipe, [f"model={{mllm: {tmp_path / kind}}}", *more])
        return " ".join(finding.line() for finding in found if finding.level == "error")

    for recipe in ("align-real", "instruct-real"):
        assert said(recipe, "Llava") == ""
        assert "the model is a llava_onevision; align and instruct train models that take boxes" in said(
            recipe, "LlavaOnevision"
        )
    for more in ("lora={rank: 2}", "model.quant=nf4"):
        assert "the model is a llava, without regions" in said("instruct-real", "Llava", more)


def test_the_tower_of_a_llava_onevision_15_is_looked_at(parents, tmp_path):
    """Transformers does not know its `rice_vit`; `load_tower`, and so `align`, does."""
    sizes = {"depth": 3, "embed_dim": 32, "num_heads": 2, "intermediate_size": 64}
    whole = {"model_type": "llavaonevision1_5", "vision_config": {"model_type": "rice_vit", **sizes}}
    (tmp_path / "config.json").write_text(json.dumps(whole))
    assert findings(parents, tmp_path) == ""
    assert "a multiple of 14" in findings(parents, tmp_path, "model.image_size=60")


@pytest.mark.parametrize("name", PACKAGED)
def test_every_packaged_recipe_is_right(name, parents, wholes, tmp_path, monkeypatch):
    """As it stands, with small models of the classes it is for, and files of the names it asks for."""
    recipe = read_stage_recipe(name)
    if hasattr(recipe.model, "mllm"):
        models = [f"model.mllm={wholes['LlavaNext' if 'next' in name else 'Llava']}"]
    else:
        (parents / "plain_lm").mkdir(exist_ok=True)
        models = [f"model.tower={parents / 'rice'}", f"model.language_model={parents / 'plain_lm'}"]
    monkeypatch.chdir(tmp_path)
    talk = [{"from": "human", "value": "<image>What is it?"}, {"from": "gpt", "value": "A star."}]
    for source in getattr(recipe.data, "sources", ()):
        for address in source.names():
            path = tmp_path / (source.root or ".") / address
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(
                json.dumps([{"conversations": talk}] if path.suffix == ".json" else {"conversations": talk})
            )
    assert [finding.line() for finding in check_recipe(name, models) if finding.level == "error"] == []
    # And the check can fail:
    if recipe.lr.region_projector == 0:
        said = " ".join(finding.line() for finding in check_recipe(name, [*models, "lr.region_projector=1e-3"]))
        assert "nothing in the data asks about a region" in said


def test_other_recipes_and_absent_models_are_one_sentence(parents):
    with pytest.raises(UserError, match="no recipe of align or instruct"):
        check_recipe("rice-nano")
    with pytest.raises(UserError, match="no model can be opened"):
        check_recipe("instruct-real", [f"model.mllm={parents / 'absent'}"])
    with pytest.raises(UserError, match="no tower can be opened"):
        findings(parents, "absent")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("- model\n- data\n", "a recipe is a mapping of keys to values, and here it is a list"),
        ("some words", "a recipe is a mapping of keys to values, and here it is 'some words'"),
        ("model: 5", "model is a mapping of keys to values, and here it is 5"),
        ("model: [tower, language_model]", "model is a mapping of keys to values, and here it is a list"),
        ("model: {mllm: 5}", "model.mllm"),
        ("model: {mllm: x}\ndata: 5\ntrain: {steps: 1}", "data"),
        ("", "no recipe of align or instruct"),
    ],
)
def test_a_file_that_is_no_recipe_is_one_sentence(tmp_path, text, said):
    path = tmp_path / "list.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        check_recipe(path)
    assert "list.yaml" in str(error.value) and said in str(error.value) and "\n" not in str(error.value)


def test_a_language_model_with_a_broken_recipe_is_one_sentence(parents, tmp_path):
    (tmp_path / "recipe.yaml").write_text("- data")
    with pytest.raises(UserError, match=r"recipe\.yaml: a recipe is a mapping"):
        findings(parents, "rice", f"model.language_model={tmp_path}")


def test_the_kinds_with_a_region_are_those_whose_questions_hold_one():
    import random

    asking = set()
    for seed in range(30):
        record = generate_scene(seed).record
        for name, kind in KINDS.items():
            if any(turn.question_boxes for turn in kind(record, random.Random(seed))):
                asking.add(name)
    assert asking == REGION_KINDS
