"""What `check` finds in recipes."""

import pytest
import yaml

from regiontower.train_stages.check_recipe import REGION_KINDS, check_recipe
from regiontower.train_stages.conversation_kinds import KINDS
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
    assert findings(parents, "rice", "lr.tower=1e-5") == ""  # its last blocks learn from regions


@pytest.mark.parametrize(
    ("tower", "more", "said"),
    [
        ("rice", "model.image_size=60", "a multiple of 14"),
        ("siglip", "model.image_size=70", "takes 56 px"),
        ("rice", "model.box_format=qwen2", "the language model learned square100"),
        ("rice", "data.mix={grounding: 1, referring: 0}", "never gets a gradient"),
        ("siglip", "lr.tower=1e-5", "the last 1 blocks of the tower get no gradient"),
    ],
)
def test_each_mistake_is_found(parents, tower, more, said):
    assert said in findings(parents, tower, more)


def test_other_recipes_and_absent_models_are_one_sentence(parents):
    with pytest.raises(UserError, match="no recipe of align or instruct"):
        check_recipe("rice-nano")
    with pytest.raises(UserError, match="no model can be opened"):
        findings(parents, "absent")


def test_the_kinds_with_a_region_are_those_whose_questions_hold_one():
    import random

    asking = set()
    for seed in range(30):
        record = generate_scene(seed).record
        for name, kind in KINDS.items():
            if any(turn.question_boxes for turn in kind(record, random.Random(seed))):
                asking.add(name)
    assert asking == REGION_KINDS
