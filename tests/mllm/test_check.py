"""What `check` finds: each mistake alone, in a model that is right otherwise."""

import json

import pytest

from regiontower.benchmarks._tiny_llavas import tiny_llava, tiny_tower
from regiontower.mllm import swap_vision_tower
from regiontower.mllm.check import check_model, report
from regiontower.vision_towers import UserError


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A tiny LLaVA with an untouched tower of CLIP, saved."""
    folder = tmp_path_factory.mktemp("llava")
    for part in swap_vision_tower(*tiny_llava("Llava"), tiny_tower("CLIP")):
        part.save_pretrained(folder)
    return folder


def changed(saved, tmp_path, file, **values):
    """A copy of it with other values in one JSON file; a dotted name reaches into a block."""
    for path in saved.iterdir():
        if path.suffix in (".json", ".jinja", ".model"):
            (tmp_path / path.name).write_bytes(path.read_bytes())
    fields = json.loads((tmp_path / file).read_text())
    for name, value in values.items():
        *blocks, last = name.split("__")
        block = fields
        for key in blocks:
            block = block[key]
        block[last] = value
    (tmp_path / file).write_text(json.dumps(fields))
    return tmp_path


def words(findings, level="error"):
    return " ".join(finding.line() for finding in findings if finding.level == level)


def test_a_model_that_is_right_has_no_errors(saved, tiny_mllm_dir):
    assert not words(check_model(saved))
    assert not words(check_model(tiny_mllm_dir))


@pytest.mark.parametrize(
    ("file", "values", "level", "said"),
    [
        ("processor_config.json", {"patch_size": 7}, "error", "counts patches of 7 px"),
        ("processor_config.json", {"num_additional_image_tokens": 0}, "error", "placeholders"),
        ("processor_config.json", {"vision_feature_select_strategy": "full"}, "error", "placeholders"),
        ("config.json", {"image_seq_length": 577}, "warning", "image_seq_length is 577"),
        ("config.json", {"image_token_index": 3}, "error", "the model looks for 3"),
        ("config.json", {"text_config__max_position_embeddings": 8}, "error", "no room for a question"),
        ("processor_config.json", {"image_processor__image_mean": [0.5, 0.5, 0.5]}, "warning", "image_mean"),
        ("processor_config.json", {"image_processor__do_normalize": False}, "error", "not normalised"),
    ],
)
def test_each_mistake_is_found(saved, tmp_path, file, values, level, said):
    assert said in words(check_model(changed(saved, tmp_path, file, **values)), level)


def test_a_center_crop_and_a_wrong_size_are_found(saved, tmp_path):
    crop = {"image_processor__do_pad": False, "image_processor__do_center_crop": True}
    assert "cropped at the centre" in words(
        check_model(changed(saved, tmp_path, "processor_config.json", **crop)), "warning"
    )
    sides = {"height": 70, "width": 70}
    both = {"image_processor__size": sides, "image_processor__crop_size": sides}
    assert "positions are for" in words(check_model(changed(saved, tmp_path, "processor_config.json", **both)))


def test_a_tower_without_a_class_token_must_not_lose_its_first_patch(tmp_path):
    for part in swap_vision_tower(*tiny_llava("Llava"), tiny_tower("SigLIP")):
        part.save_pretrained(tmp_path)
    assert not words(check_model(tmp_path))
    fields = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(fields | {"vision_feature_select_strategy": "default"}))
    assert "no class token" in words(check_model(tmp_path))


def test_lora_patterns_that_reach_the_tower_are_found(saved, tmp_path):
    folder = changed(saved, tmp_path, "config.json")
    (folder / "adapter_config.json").write_text(json.dumps({"target_modules": ["q_proj"]}))
    assert "modules of the tower" in words(check_model(folder), "warning")
    (folder / "adapter_config.json").write_text(json.dumps({"target_modules": r".*language_model.*q_proj"}))
    assert "modules of the tower" not in words(check_model(folder), "warning")


def test_the_report_counts_and_what_is_no_llava_is_refused(saved, tmp_path):
    found = report(check_model(changed(saved, tmp_path, "processor_config.json", patch_size=7)))
    assert found["errors"] == 1 and set(found["findings"][0]) == {"level", "what", "why", "mend"}
    with pytest.raises(UserError, match="no model can be opened"):
        check_model(tmp_path / "absent")
