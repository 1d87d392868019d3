"""What `check` finds: each mistake alone, in a model that is right otherwise."""

import json

import pytest

from regiontower.benchmarks._tiny_llavas import tiny_llava, tiny_tower
from regiontower.mllm import add_regions, swap_vision_tower
from regiontower.mllm.adapters import write_adapter
from regiontower.mllm.check import check_model
from regiontower.mllm.findings import report
from regiontower.train_stages.lora import LoraRecipe, add_lora
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


@pytest.fixture(scope="module")
def tiled(tmp_path_factory):
    """Of each kind with tiles one that is right, by name."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("LlavaNext", "LlavaOnevision", "RegionLlavaNext")}
    for name, folder in folders.items():
        pair = swap_vision_tower(*tiny_llava(name.removeprefix("Region")), tiny_tower("RICE"))
        for part in add_regions(*pair) if name.startswith("Region") else pair:
            part.save_pretrained(folder)
    return folders


def test_a_model_that_is_right_has_no_errors(saved, tiny_mllm_dir, tiled):
    assert not words(check_model(saved))
    assert not words(check_model(tiny_mllm_dir))
    for folder in tiled.values():
        assert not check_model(folder)


@pytest.mark.parametrize("kind", ["LlavaNext", "LlavaOnevision", "RegionLlavaNext"])
def test_tiles_that_are_cut_in_another_way_than_they_are_put_together_are_found(tiled, tmp_path, kind):
    points = [[56, 112], [112, 112]]
    folder = changed(tiled[kind], tmp_path, "config.json", image_grid_pinpoints=points)
    assert "cut in one way and put together in another" in words(check_model(folder))
    odd = [[80, 112], [112, 112]]  # no multiples of a tile
    changed(tiled[kind], tmp_path, "config.json", image_grid_pinpoints=odd)
    name = "processor_config.json"
    fields = json.loads((tmp_path / name).read_text())
    fields["image_processor"]["image_grid_pinpoints"] = odd
    (tmp_path / name).write_text(json.dumps(fields))
    assert "for 112 x 80 px" in words(check_model(folder))


@pytest.mark.parametrize("more", [0, 2])
def test_onevisions_own_count_of_image_tokens_is_looked_at(tiled, tmp_path, more):
    folder = changed(tiled["LlavaOnevision"], tmp_path, "processor_config.json", num_image_tokens=16 + more)
    assert f"writes {15 + more} placeholders for 56 px, the model makes 16" in words(check_model(folder))


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


def test_registers_and_class_tokens_among_the_patches_are_found(saved, tmp_path):
    native = tiny_tower("DINOv3").config.to_dict()
    assert "4 registers are taken for patches" in words(
        check_model(changed(saved, tmp_path, "config.json", vision_config=native))
    )
    changed(saved, tmp_path, "config.json", vision_feature_select_strategy="full")
    fields = json.loads((tmp_path / "processor_config.json").read_text())
    (tmp_path / "processor_config.json").write_text(json.dumps(fields | {"vision_feature_select_strategy": "full"}))
    found = check_model(tmp_path)
    assert not words(found) and "tokens that are no patches, 1, stay among the image tokens" in words(found, "warning")


def test_a_vip_llava_always_drops_the_first_token(tmp_path):
    (tmp_path / "changed").mkdir()
    for part in swap_vision_tower(*tiny_llava("VipLlava"), tiny_tower("RICE")):
        part.save_pretrained(tmp_path)
    assert not words(check_model(tmp_path))
    kept = {"vision_feature_select_strategy": "full"}
    folder = changed(tmp_path, tmp_path / "changed", "processor_config.json", **kept)
    assert "writes 17 placeholders for 56 px, the model makes 16" in words(check_model(folder))


def test_a_tower_whose_own_size_is_no_multiple_of_its_patch_is_right(tmp_path):
    """SigLIP-so400m/14 at 384 px, in most of LLaVA-OneVision: 27 patches a side, and 6 px that no patch covers."""
    for kind in ("Llava", "LlavaNext", "LlavaOnevision"):
        for part in swap_vision_tower(*tiny_llava(kind), tiny_tower("SigLIP", image_size=60)):
            part.save_pretrained(tmp_path / kind)
        assert check_model(tmp_path / kind) == []


def test_lora_patterns_that_reach_the_tower_are_found(saved, tmp_path):
    """Beside a model's own files, as other tools leave an adapter."""
    folder = changed(saved, tmp_path, "config.json")

    def said(**fields):
        adapter = {"peft_type": "LORA", "base_model_name_or_path": str(saved)} | fields
        (folder / "adapter_config.json").write_text(json.dumps(adapter))
        return "modules of the tower" in words(check_model(folder), "warning")

    assert said(target_modules=["q_proj"]) and said(target_modules=r".*q_proj")
    assert not said(target_modules=r".*language_model.*q_proj")
    assert not said(target_modules=["q_proj"], exclude_modules=r".*vision_tower.*")


@pytest.mark.parametrize("on", [("language_model",), ("language_model", "tower")])
def test_a_lora_run_is_looked_at_with_its_base(tmp_path, on):
    model, processor = add_regions(*swap_vision_tower(*tiny_llava("Llava"), tiny_tower("RICE")))
    for part in (model, processor):
        part.save_pretrained(tmp_path / "base")
    add_lora(model, LoraRecipe(rank=2, on=on))
    (tmp_path / "run").mkdir()
    write_adapter(model, tmp_path / "run", str(tmp_path / "base"), ())
    processor.image_size = 70
    processor.save_pretrained(tmp_path / "run")
    found = check_model(tmp_path / "run")
    assert ("modules of the tower" in words(found, "warning")) == ("tower" in on)
    assert "image_seq_length is 16, a view has 25 tokens" in words(found, "warning")  # by the run's own processor


def test_the_report_counts_and_what_is_no_llava_is_refused(saved, tmp_path):
    found = report(check_model(changed(saved, tmp_path, "processor_config.json", patch_size=7)))
    assert found["errors"] == 1 and set(found["findings"][0]) == {"level", "what", "why", "mend"}


def test_what_cannot_be_looked_at_is_one_sentence(saved, tmp_path):
    tiny_tower("RICE").save_pretrained(tmp_path / "tower")
    (tmp_path / "old").mkdir()
    old = changed(saved, tmp_path / "old", "config.json", vision_feature_select_strategy="patch")  # as LLaVA's own code
    cases = {
        "no model can be opened": tmp_path / "absent",
        "is a rice_vision_model; only LLaVA-style": tmp_path / "tower",
        r"expected one of \('default', 'full'\), got patch": old,
    }
    for message, source in cases.items():
        with pytest.raises(UserError, match=message) as error:
            check_model(source)
        assert "\n" not in str(error.value)
