"""swap_vision_tower: everything that has to agree with the tower does, and the language model is untouched."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, CLIPVisionModel

from regiontower.benchmarks._tiny_llavas import KINDS, OTHER_WIDTH, TOWERS, WIDTH, save_as, tiny_llava, tiny_tower
from regiontower.mllm import add_regions, swap_vision_tower
from regiontower.vision_towers import (
    RiceVisionConfig,
    RiceVisionModel,
    RoiVisionModel,
    UserError,
    describe_tower,
    load_tower,
)

QUESTION = "USER: <image> What is in the picture ? ASSISTANT:"
NO_CLASS_TOKEN = ("SigLIP", "SigLIP2, fixed size", "AIMv2")
PAIRS = [(kind, tower) for kind in KINDS for tower in TOWERS if kind != "VipLlava" or tower not in NO_CLASS_TOKEN]


def ask(model, processor, picture):
    inputs = processor(images=[picture], text=[QUESTION], return_tensors="pt").to(model.dtype)
    with torch.no_grad():
        return model(**inputs).logits, inputs


def of_language(model):
    keep = ("model.vision_tower.", "model.multi_modal_projector.")
    return {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(keep)}


@pytest.mark.parametrize(("kind", "tower"), PAIRS)
def test_complaint_2_image_tokens_match_after_a_swap(kind, tower, noise_image):
    """After a swap the processor writes another number of image tokens than the tower gives features, because of a
    class token more or less: "Image features and image tokens do not match"."""
    model, processor = swap_vision_tower(*tiny_llava(kind), tiny_tower(tower))
    for size in ((130, 90), (40, 200)):
        _, inputs = ask(model, processor, noise_image(*size))  # raises when they do not match
        counted = processor._get_num_multimodal_tokens(image_sizes=[(size[1], size[0])])["num_image_tokens"]
        assert [int((inputs["input_ids"] == model.config.image_token_id).sum())] == counted


@pytest.mark.parametrize("tower", ["CLIP", "SigLIP", "DINOv3"])
def test_complaint_2_frames_of_a_video_and_several_pictures_match_too(tower, noise_image):
    model, processor = swap_vision_tower(*tiny_llava("LlavaOnevision"), tiny_tower(tower))
    video = np.random.default_rng(0).integers(0, 256, (3, 70, 90, 3), dtype=np.uint8)
    several = [noise_image(), noise_image(40, 200)]
    asked = [
        processor(videos=[video], text=["USER: <video> What ?"], return_tensors="pt"),
        processor(images=[several], text=["USER: <image> <image> What ?"], return_tensors="pt"),
    ]
    with torch.no_grad():
        assert all(model(**inputs).logits.isfinite().all() for inputs in asked)


@pytest.mark.parametrize("kind", ["Llava", "LlavaNext", "LlavaOnevision"])
def test_a_side_that_is_no_multiple_of_the_patch(kind, noise_image):
    """SigLIP-so400m/14 has 384 px: 27 patches a side, and 6 px that none covers."""
    model, processor = swap_vision_tower(*tiny_llava(kind), tiny_tower("SigLIP", image_size=60))
    _, inputs = ask(model, processor, noise_image(130, 90))
    assert inputs["pixel_values"].shape[-1] == 60 and getattr(model.config, "image_seq_length", 16) == 16
    if kind != "LlavaOnevision":
        model, processor = add_regions(model, processor)
        inputs = processor([noise_image(130, 90)], ["<image>What is in <region> ?"], boxes=[[(5, 5, 125, 85)]])
        with torch.no_grad():
            assert model(**inputs).logits.isfinite().all()


@pytest.mark.parametrize("tower", TOWERS)
def test_complaint_3_the_language_model_sees_every_patch_and_nothing_else(tower, noise_image):
    """The first token of a tower without a class token is cut off, and nothing says so: the picture loses its corner.
    Or registers stay in, and pass for patches."""
    model, processor = swap_vision_tower(*tiny_llava("Llava"), given := tiny_tower(tower))
    inputs = processor(images=[noise_image()], text=[QUESTION], return_tensors="pt")
    native = given.to_native() if hasattr(given, "to_native") else given
    with torch.no_grad():
        states = native(inputs["pixel_values"], output_hidden_states=True).hidden_states
        patches = states[model.config.vision_feature_layer][:, describe_tower(native.config).num_prefix_tokens :]
        (features,) = model.model.get_image_features(inputs["pixel_values"]).pooler_output
        assert torch.equal(features, model.model.multi_modal_projector(patches)[0]) and len(features) == 16


@pytest.mark.parametrize("kind", KINDS)
def test_only_tower_and_projector_change_and_the_class_stays(kind):
    model, processor = tiny_llava(kind)
    before = {name: tensor.clone() for name, tensor in of_language(model).items()}
    new, _ = swap_vision_tower(model, processor, tiny_tower("MLCD"))
    after = of_language(new)
    assert type(new) is type(model) and before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert new.lm_head.weight.data_ptr() == model.lm_head.weight.data_ptr()  # never a second language model
    assert not any(tensor.is_meta for tensor in (*new.parameters(), *new.buffers()))
    assert new.config.vision_config is new.model.vision_tower.config
    assert model.config.vision_config.model_type != "mlcd_vision_model"  # the given configuration is left alone


def test_a_tower_stays_native_and_registers_are_left_out_by_ours():
    for name in TOWERS:
        tower = swap_vision_tower(*tiny_llava("Llava"), tiny_tower(name))[0].model.vision_tower
        assert isinstance(tower, RoiVisionModel) == (name == "DINOv3")
        assert type(tower).__module__.startswith("transformers.") == (name != "DINOv3")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["v4", "v5"])
def test_saving_and_opening_changes_no_logit(layout, dtype, noise_image, tmp_path):
    """A swapped model that was opened from the older key layout used to be written under the old tower's names."""
    source = save_as(*tiny_llava("Llava", dtype), tmp_path / "source", layout)
    model, info = AutoModelForImageTextToText.from_pretrained(source, dtype=dtype, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    new, processor = swap_vision_tower(model.eval(), AutoProcessor.from_pretrained(source), tiny_tower("RICE"))
    logits, inputs = ask(new, processor, noise_image())
    new.save_pretrained(tmp_path / "out")
    processor.save_pretrained(tmp_path / "out")
    again, info = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    found, same = ask(again.eval(), AutoProcessor.from_pretrained(tmp_path / "out"), noise_image())
    assert again.dtype == dtype and torch.equal(found, logits)
    assert torch.equal(same["pixel_values"], inputs["pixel_values"])


def test_the_processor_takes_the_towers_pixels_and_cuts_nothing_off(noise_image):
    model, processor = tiny_llava("Llava")
    _, new = swap_vision_tower(model, processor, tiny_tower("SigLIP"))
    assert list(new.image_processor.image_mean) == [0.5] * 3 and new.tokenizer is processor.tokenizer
    wide = noise_image(200, 60)
    pixels = new(images=[wide], text=[QUESTION], return_tensors="pt")["pixel_values"][0]
    assert pixels.shape == (3, 56, 56)
    assert pixels[:, :18].abs().max() < 0.05 and pixels[:, 22:34].std() > 0.1  # bars above a whole picture
    assert list(processor.image_processor.image_mean) != [0.5] * 3  # the given processor is left alone


def test_tiles_follow_the_towers_size():
    model, processor = tiny_llava("LlavaNext")
    new, follower = swap_vision_tower(model, processor, tiny_tower("MLCD", image_size=84))
    points = [[84, 168], [168, 84], [168, 168]]
    assert new.config.image_grid_pinpoints == follower.image_processor.image_grid_pinpoints == points
    assert new.config.image_seq_length == 36 and model.config.image_grid_pinpoints[0] == [56, 112]


def test_the_new_projector_is_the_same_every_time_and_an_old_one_is_kept_on_request():
    first, second = (swap_vision_tower(*tiny_llava("Llava"), tiny_tower("CLIP"))[0] for _ in range(2))
    weights = [model.model.multi_modal_projector.linear_1.weight for model in (first, second)]
    assert torch.equal(*weights) and weights[0].std() > 0
    model, processor = tiny_llava("Llava")
    old = model.model.multi_modal_projector
    kept, _ = swap_vision_tower(model, processor, tiny_tower("CLIP", WIDTH), keep_projector=True)
    assert kept.model.multi_modal_projector is old
    with pytest.raises(UserError, match=f"a tower {OTHER_WIDTH} wide needs") as error:
        swap_vision_tower(model, processor, tiny_tower("CLIP"), keep_projector=True)
    assert "\n" not in str(error.value)


def test_our_rice_becomes_native_without_being_built_again():
    """Initialising 300 million weights that are then replaced used to take longer than the rest of a swap."""
    tower = tiny_tower("RICE")
    before = torch.get_rng_state()
    native = tower.to_native()
    assert torch.equal(torch.get_rng_state(), before)  # nothing was drawn
    assert native.pre_layrnorm.weight.data_ptr() == tower.pre_layrnorm.weight.data_ptr()


@pytest.mark.parametrize("rounded", [False, True])
def test_rotary_frequencies_stay_float32_in_a_bf16_model(rounded):
    given = tiny_tower("RICE")
    given = given.to(torch.bfloat16) if rounded else given  # which rounds the frequencies, too
    model, _ = swap_vision_tower(*tiny_llava("Llava", torch.bfloat16), given)
    tower = model.model.vision_tower
    assert {parameter.dtype for parameter in tower.parameters()} == {torch.bfloat16}
    assert {buffer.dtype for buffer in tower.buffers() if buffer.is_floating_point()} == {torch.float32}


def test_what_does_not_fit_is_refused_in_one_line():
    cases = {
        "swap in a tower with one class token": ("VipLlava", tiny_tower("SigLIP"), None, None),
        "give a feature layer between -4 and 3": ("Llava", tiny_tower("CLIP"), 9, None),
        "state -4, and a tower of 1 layer": ("VipLlava", tiny_tower("MLCD", num_hidden_layers=1), None, [-1, -4]),
    }
    for message, (kind, tower, layer, layers) in cases.items():
        model, processor = tiny_llava(kind)
        if layers is not None:
            model.config.vision_feature_layer = layers
        with pytest.raises(UserError, match=message) as error:
            swap_vision_tower(model, processor, tower, feature_layer=layer)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["Llava", "LlavaNext"])
@pytest.mark.parametrize("tower", ["CLIP", "SigLIP", "DINOv3", "RICE"])
def test_a_model_with_regions_keeps_them_on_another_tower(kind, tower, noise_image):
    model, processor = add_regions(*swap_vision_tower(*tiny_llava(kind), tiny_tower("RICE", seed=5)))
    before = {name: tensor.clone() for name, tensor in of_language(model).items() if "region_projector" not in name}
    new, follower = swap_vision_tower(model, processor, tiny_tower(tower, image_size=84))
    after = of_language(new)
    assert type(new) is type(model) and type(follower) is type(processor)
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert isinstance(new.model.vision_tower, RiceVisionModel if tower == "RICE" else RoiVisionModel)
    boxes = [[(5, 5, 60, 60)]], [[(60, 30, 110, 80)]]
    asked = [follower([noise_image()], ["<image>What is in <region> ?"], boxes=box) for box in boxes]
    assert asked[0]["pixel_values"].shape[-1] == 84 and processor.image_size == 56
    assert list(follower.image_processor.image_mean) == list(describe_tower(new.config.vision_config).image_mean)
    with torch.no_grad():
        logits = [new(**inputs).logits for inputs in asked]
    assert logits[0].isfinite().all() and not torch.allclose(logits[0][0, -1], logits[1][0, -1], atol=1e-4)
    assert not any(tensor.is_meta for tensor in (*new.parameters(), *new.buffers()))
    assert set(new.generation_config.suppress_tokens) == {follower.image_token_id, follower.region_token_id}


@pytest.mark.parametrize(
    "choices", [{"projector": "merge2x2_mlp", "image_position": "sin2d"}, {"row_end": True}], ids=str
)
def test_choices_of_a_region_llava_stay(make_tiny_mllm, noise_image, choices):
    model, processor = make_tiny_mllm(**choices)
    new, follower = swap_vision_tower(model, processor, tiny_tower("RICE", image_size=84))
    for name, value in choices.items():
        assert getattr(new.config, name) == value
    inputs = follower([noise_image(84, 84)], ["<image>What is in <region>?"], boxes=[[(5, 5, 60, 60)]])
    with torch.no_grad():
        assert new(**inputs).logits.isfinite().all()  # row ends, too, have first values
    assert int((inputs["input_ids"] == new.config.image_token_id).sum()) == new.config.image_seq_length
    if "projector" in choices:
        with pytest.raises(UserError, match="merges blocks of 2 x 2 patches, and this tower has 5 x 5") as error:
            swap_vision_tower(model, processor, tiny_tower("RICE", image_size=70))
        assert "\n" not in str(error.value)


def test_both_projectors_of_a_region_llava_are_kept_on_request():
    model, processor = add_regions(*swap_vision_tower(*tiny_llava("Llava"), tiny_tower("RICE")))
    kept, _ = swap_vision_tower(model, processor, tiny_tower("RICE", seed=9), keep_projector=True)
    assert kept.model.region_projector is model.model.region_projector
    with pytest.raises(UserError, match="needs"):
        swap_vision_tower(model, processor, tiny_tower("RICE", WIDTH), keep_projector=True)


def test_other_models_and_quantised_ones_are_refused():
    model, processor = tiny_llava("Llava")
    with pytest.raises(UserError, match="the tower of a llama cannot be swapped"):
        swap_vision_tower(model.model.language_model, processor, tiny_tower("CLIP"))
    model.config.quantization_config = {"quant_method": "bitsandbytes"}
    with pytest.raises(UserError, match="swap the tower of the unquantised checkpoint"):
        swap_vision_tower(model, processor, tiny_tower("CLIP"))


def test_complaint_7_no_name_decides_how_a_tower_is_read(tmp_path, noise_image):
    """Towers are looked up by parts of their path: a renamed folder is an "unknown vision tower", or another one."""
    tower, answers = tiny_tower("SigLIP"), []
    for name in ("clip-vit-large-patch14-336", "my own tower"):
        tower.save_pretrained(tmp_path / name)
        model, processor = swap_vision_tower(*tiny_llava("Llava"), load_tower(tmp_path / name))
        answers.append(ask(model, processor, noise_image())[0])
    assert torch.equal(*answers) and not isinstance(model.model.vision_tower, CLIPVisionModel)


def test_rice_options_do_not_reach_the_native_tower():
    rice = tiny_tower("RICE", num_region_layers=3)
    assert isinstance(rice.config, RiceVisionConfig)
    model, _ = swap_vision_tower(*tiny_llava("Llava"), rice)
    assert "num_region_layers" not in model.config.to_dict()["vision_config"]
