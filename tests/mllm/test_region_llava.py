"""RegionLlava beside plain LLaVA, and regions through generate."""

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaConfig, LlavaForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutputWithPooling

from regiontower.mllm import Question, RegionLlavaForConditionalGeneration, RegionLlavaProcessor, answer_questions
from regiontower.mllm.answers import model_inputs, user_prompt
from regiontower.vision_towers import UserError

BOXES = [[], [(10, 10, 50, 50)], [(5, 5, 60, 40), (0, 0, 120, 90), (100, 70, 108, 78)]]
TEXTS = ["Where is the star?", "What is in <region>?", "<region> <region> or <region>?"]


@pytest.fixture(scope="module")
def batch(tiny_mllm, noise_image):
    _, processor = tiny_mllm
    images = [noise_image(120, 90, seed) for seed in range(3)]
    return images, processor(
        images, [user_prompt(processor, t) for t in TEXTS], boxes=BOXES, padding=True, padding_side="left"
    )


def plain_twin(model) -> LlavaForConditionalGeneration:
    """Plain LLaVA with the same weights."""
    fields = model.config.to_dict()
    for name in ("model_type", "region_token_index", "projector", "image_position", "row_end"):
        fields.pop(name)
    native = model.model.vision_tower.to_native()
    fields |= {"vision_config": native.config, "text_config": model.config.text_config}
    plain = LlavaForConditionalGeneration(LlavaConfig(**fields))
    state = {k: v for k, v in model.state_dict().items() if "region_projector" not in k}
    plain.load_state_dict(state)
    return plain.train(model.training)


@pytest.mark.parametrize("training", [False, True])
def test_without_regions_equals_plain_llava_to_the_bit(make_tiny_mllm, noise_image, training):
    model, processor = make_tiny_mllm()
    model.train(training)
    plain = plain_twin(model)
    inputs = processor([noise_image()], [user_prompt(processor, "Where is the star?")])
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == processor.image_token_id, -100)
    ours, theirs = model(**inputs, labels=labels), plain(**inputs, labels=labels)
    assert torch.equal(ours.logits, theirs.logits) and torch.equal(ours.loss, theirs.loss)
    ours.loss.backward()
    theirs.loss.backward()
    for name, parameter in plain.named_parameters():
        twin = model.get_parameter(name).grad
        if parameter.grad is None:  # the last tower layer: ours runs it for the idle region, times zero
            assert twin is None or not twin.any(), name
        else:
            assert torch.equal(twin, parameter.grad), name


def test_text_only_equals_the_language_model(tiny_mllm):
    model, processor = tiny_mllm
    inputs = processor(text="none", boxes=None)
    with torch.no_grad():
        ours = model(**inputs).logits
        hidden = model.model.language_model(**inputs).last_hidden_state
    assert torch.equal(ours, model.lm_head(hidden))


def test_regions_change_the_answer_and_only_where_they_stand(tiny_mllm, batch):
    model, processor = tiny_mllm
    _, inputs = batch
    moved = inputs["boxes"].clone()
    moved[1, 0] = torch.tensor([32.0, 20.0, 60.0, 50.0])
    with torch.no_grad():
        before = model(**inputs).logits
        after = model(**{**inputs, "boxes": moved}).logits
    assert torch.equal(before[[0, 2]], after[[0, 2]])
    position = int((inputs["input_ids"][1] == processor.region_token_id).nonzero()[0])
    assert torch.equal(before[1, :position], after[1, :position])
    assert not torch.allclose(before[1, position:], after[1, position:], atol=1e-3)


def test_region_rows_are_the_towers_embeddings_projected_in_placeholder_order(tiny_mllm, batch):
    model, _ = tiny_mllm
    _, inputs = batch
    with torch.no_grad():
        rows = model.model.get_image_features(
            inputs["pixel_values"], boxes=inputs["boxes"], region_counts=inputs["region_counts"]
        ).region_embeds
        for image, count, start in ((1, 1, 0), (2, 3, 1)):
            tower = model.model.vision_tower(
                inputs["pixel_values"][image : image + 1], boxes=inputs["boxes"][image : image + 1, :count]
            )
            expected = model.model.region_projector(tower.region_embeds[0])
            torch.testing.assert_close(rows[start : start + count], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("use_cache", [True, False])
def test_batched_generation_equals_one_by_one(tiny_mllm, batch, beams, use_cache):
    model, processor = tiny_mllm
    images, inputs = batch
    options = {"max_new_tokens": 8, "num_beams": beams, "do_sample": False, "use_cache": use_cache}
    together = model.generate(**model_inputs(model, inputs), **options)[:, inputs["input_ids"].shape[1] :]
    for row, (image, text, boxes) in enumerate(zip(images, TEXTS, BOXES, strict=True)):
        single = processor([image], [user_prompt(processor, text)], boxes=[boxes])
        alone = model.generate(**model_inputs(model, single), **options)[0, single["input_ids"].shape[1] :]
        common = min(len(alone), together.shape[1])
        assert together[row, :common].tolist() == alone[:common].tolist()
        assert len(set(alone.tolist())) > 1 or len(alone) == 1  # an answer, not one token repeated


def test_cache_on_and_off_give_the_same_ids(tiny_mllm, batch):
    model, _ = tiny_mllm
    inputs = model_inputs(model, batch[1])
    kept, again = (model.generate(**inputs, max_new_tokens=8, use_cache=use_cache) for use_cache in (True, False))
    assert torch.equal(kept, again)


def test_chunked_prefill_equals_whole_prefill(tiny_mllm, noise_image):
    model, processor = tiny_mllm
    inputs = model_inputs(model, processor([noise_image()], [user_prompt(processor, TEXTS[2])], boxes=[BOXES[2]]))
    whole = model.generate(**inputs, max_new_tokens=6)
    assert torch.equal(model.generate(**inputs, max_new_tokens=6, prefill_chunk_size=16), whole)


def test_the_tower_runs_once_a_generate(tiny_mllm, batch):
    model, _ = tiny_mllm
    calls = []
    handle = model.model.vision_tower.register_forward_hook(lambda *_: calls.append(1))
    try:
        model.generate(**model_inputs(model, batch[1]), max_new_tokens=5, num_beams=2)
    finally:
        handle.remove()
    assert len(calls) == 1


def test_precomputed_features_equal_pixels(tiny_mllm, batch):
    model, _ = tiny_mllm
    inputs = model_inputs(model, batch[1])
    pixels, boxes, counts = inputs.pop("pixel_values"), inputs.pop("boxes"), inputs.pop("region_counts")
    with torch.no_grad():
        image = model.model.get_image_features(pixels, boxes=boxes, region_counts=counts)
        encoded = {"image": image, "region": BaseModelOutputWithPooling(pooler_output=[image.region_embeds])}
        reused = model(**inputs, mm_encoder_outputs=encoded).logits
        direct = model(**inputs, pixel_values=pixels, boxes=boxes, region_counts=counts).logits
    assert torch.equal(reused, direct)


def test_placeholders_are_never_generated(tiny_mllm, tiny_mllm_dir):
    model, processor = tiny_mllm
    reloaded = RegionLlavaForConditionalGeneration.from_pretrained(tiny_mllm_dir)
    for config in (model.generation_config, reloaded.generation_config):
        assert {processor.image_token_id, processor.region_token_id} <= set(config.suppress_tokens)


@pytest.mark.parametrize(
    "change",
    [
        lambda inputs: inputs | {"boxes": inputs["boxes"][:, :1], "region_counts": torch.tensor([0, 1, 1])},
        lambda inputs: {k: v for k, v in inputs.items() if k not in ("boxes", "region_counts")},
        lambda inputs: inputs | {"region_counts": torch.tensor([1, 1, 3])},
    ],
    ids=["too few", "none", "too many"],
)
def test_placeholder_and_box_counts_must_agree(tiny_mllm, batch, change):
    model, _ = tiny_mllm
    with pytest.raises(UserError, match=r"holds 4 <region> placeholders") as error, torch.no_grad():
        model(**change(dict(batch[1])))
    assert str(error.value).count(".") == 1 and "\n" not in str(error.value)


def test_image_placeholders_must_agree(tiny_mllm, batch):
    model, processor = tiny_mllm
    inputs = dict(batch[1])
    inputs["input_ids"] = inputs["input_ids"].clone()
    first = (inputs["input_ids"][0] == processor.image_token_id).nonzero()[0]
    inputs["input_ids"][0, first] = processor.tokenizer.bos_token_id
    with pytest.raises(UserError, match="<image> placeholders"), torch.no_grad():
        model(**inputs)


def test_save_and_load(tiny_mllm, tiny_mllm_dir, noise_image):
    model, processor = tiny_mllm
    reloaded, info = AutoModelForImageTextToText.from_pretrained(tiny_mllm_dir, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    again = AutoProcessor.from_pretrained(tiny_mllm_dir)
    assert isinstance(again, RegionLlavaProcessor)
    for name in ("patch_size", "image_size", "merge_size", "row_end", "box_format", "region_prompt", "chat_template"):
        assert getattr(again, name) == getattr(processor, name)
    questions = [Question(noise_image(), text, boxes) for text, boxes in zip(TEXTS, BOXES, strict=True)]
    before = answer_questions(model, processor, questions, max_new_tokens=8)
    after = answer_questions(reloaded.eval(), again, questions, max_new_tokens=8)
    assert [a.text for a in before] == [a.text for a in after]


def test_a_plain_llava_directory_opens_with_only_the_region_projector_new(make_tiny_mllm, tmp_path):
    model, _ = make_tiny_mllm()
    plain = plain_twin(model)
    for layout in (True, False):  # the hub's older key names, and today's in memory
        plain.save_pretrained(tmp_path / str(layout), save_original_format=layout)
        _, info = RegionLlavaForConditionalGeneration.from_pretrained(
            tmp_path / str(layout), config=model.config, output_loading_info=True
        )
        assert info["missing_keys"] and all("region_projector" in key for key in info["missing_keys"])
        assert not info["unexpected_keys"]


@pytest.mark.parametrize(
    "choices", [{"projector": "merge2x2_mlp"}, {"image_position": "sin2d"}, {"row_end": True}], ids=str
)
def test_image_token_choices_round_trip(make_tiny_mllm, noise_image, tmp_path, choices):
    model, processor = make_tiny_mllm(**choices)
    size = (64, 32) if "row_end" in choices else (120, 90)
    inputs = processor([noise_image(*size)], [user_prompt(processor, "What is in <region>?")], boxes=[[(4, 4, 30, 30)]])
    expected = {"merge2x2_mlp": 4 * 4, "sin2d": 8 * 8, "True": 4 * (8 + 1)}[str(next(iter(choices.values())))]
    assert int((inputs["input_ids"] == processor.image_token_id).sum()) == expected
    model.save_pretrained(tmp_path)
    reloaded = RegionLlavaForConditionalGeneration.from_pretrained(tmp_path).eval()
    weights = reloaded.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    with torch.no_grad():  # where weights lie in memory shows in the last bits on some processors
        torch.testing.assert_close(reloaded(**inputs).logits, model(**inputs).logits, rtol=1e-5, atol=1e-5)
    model.train()
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert all(p.grad is not None for p in model.model.multi_modal_projector.parameters())
