"""add_regions: a plain Llava that takes boxes, and is the same without them."""

import pytest
import torch

from regiontower.benchmarks._tiny_llavas import tiny_llava, tiny_tower
from regiontower.mllm import (
    ChatSession,
    Question,
    RegionLlavaForConditionalGeneration,
    RegionLlavaProcessor,
    add_regions,
    answer_questions,
    load_mllm,
    swap_vision_tower,
)
from regiontower.mllm.answers import user_prompt
from regiontower.mllm.check import check_model
from regiontower.mllm.prompts import assistant_message, user_message
from regiontower.vision_towers import RiceVisionModel, RoiVisionModel, UserError


def full(model):
    """The same model without rows to spare in its embeddings."""
    rows = len(tiny_llava("Llava")[1].tokenizer)
    for part in (model.model.language_model.embed_tokens, model.lm_head):
        part.weight = torch.nn.Parameter(part.weight[:rows].detach())
    model.model.language_model.embed_tokens.num_embeddings = model.lm_head.out_features = rows
    model.config.text_config.vocab_size = rows
    return model


@pytest.mark.parametrize("tower", ["CLIP", "SigLIP", "RICE", "DINOv3"])
def test_without_regions_the_logits_are_the_plain_models(tower):
    plain, processor = swap_vision_tower(*tiny_llava("Llava"), tiny_tower(tower))
    text = f"USER: {processor.image_token} What is in the picture ?"
    pixels = torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    ids = processor.tokenizer(text.replace("<image>", "<image> " * 16), return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = plain(input_ids=ids, pixel_values=pixels).logits
        model, ours = add_regions(plain, processor)
        assert torch.equal(model(input_ids=ids, pixel_values=pixels).logits, expected)
    assert isinstance(model.model.vision_tower, RiceVisionModel if tower == "RICE" else RoiVisionModel)
    assert list(ours.image_processor.image_mean) == list(processor.image_processor.image_mean)
    assert len(processor.tokenizer) < len(ours.tokenizer)  # the given tokenizer is left alone


def test_a_class_token_among_the_image_tokens_stays_there(noise_image, tmp_path):
    """A LLaVA that was trained with "full" on CLIP has one token more, and its projector knows it."""
    plain, processor = swap_vision_tower(*tiny_llava("Llava"), tiny_tower("CLIP"))
    plain.config.vision_feature_select_strategy = processor.vision_feature_select_strategy = "full"
    asked = processor(images=[noise_image()], text=["USER: <image> What ?"], return_tensors="pt")
    with torch.no_grad():
        expected = plain(**asked).logits
        model, ours = add_regions(plain, processor)
        given = ours([noise_image()], ["<image>What is in <region> ?"], boxes=[[(5, 5, 60, 60)]])
        assert torch.equal(model(**asked).logits, expected) and model(**given).logits.isfinite().all()
    for part in (model, ours):
        part.save_pretrained(tmp_path)
    assert not [finding.line() for finding in check_model(tmp_path) if finding.level == "error"]


def test_boxes_are_heard_and_it_survives_saving(noise_image, tmp_path):
    model, processor = add_regions(*swap_vision_tower(*tiny_llava("Llava"), tiny_tower("RICE")))
    assert isinstance(model, RegionLlavaForConditionalGeneration) and isinstance(processor, RegionLlavaProcessor)
    picture = noise_image()
    inputs, moved = (
        processor([picture], [user_prompt(processor, "What is in <region>?")], boxes=[[box]])
        for box in ((5, 5, 60, 60), (60, 30, 110, 80))
    )
    with torch.no_grad():
        logits = model(**inputs).logits
        assert not torch.allclose(logits[0, -1], model(**inputs | {"boxes": moved["boxes"]}).logits[0, -1], atol=1e-3)
    for part in (model, processor):
        part.save_pretrained(tmp_path)
    again, _ = load_mllm(tmp_path, device="cpu")
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, logits)
    assert set(model.generation_config.suppress_tokens) == {processor.image_token_id, processor.region_token_id}


def test_a_language_model_with_settings_for_sampling_can_be_saved(tmp_path):
    """Vicuna, Qwen2 and others come with a temperature; transformers saves no greedy configuration that has one."""
    plain, processor = tiny_llava("Llava")
    plain.generation_config.update(do_sample=True, temperature=0.9, top_p=0.6, top_k=20, repetition_penalty=1.1)
    model, _ = add_regions(plain, processor)
    model.generation_config.save_pretrained(tmp_path)
    assert model.generation_config.do_sample is False and model.generation_config.repetition_penalty == 1.1
    assert plain.generation_config.temperature == 0.9


def test_templates_of_multimodal_models_take_our_plain_text(noise_image):
    plain, processor = tiny_llava("Llava")
    model, ours = add_regions(plain, processor)
    assert user_prompt(ours, "What is it ?").replace("  ", " ") == "USER: <image>What is it ? ASSISTANT:"
    parts = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What ?"}]}]
    assert ours.apply_chat_template(parts) == processor.apply_chat_template(parts)
    (answer,) = answer_questions(model, ours, [Question(noise_image(), "What is in <region>?", [(5, 5, 60, 60)])])
    assert isinstance(answer.text, str)
    assert isinstance(ChatSession(model, ours, noise_image()).ask("What is it ?").text, str)


@pytest.mark.parametrize("tie", [False, True])
def test_embeddings_grow_only_when_no_row_is_left(tie):
    plain, processor = tiny_llava("Llava", tie=tie)
    table = plain.model.language_model.embed_tokens.weight
    model, _ = add_regions(plain, processor)
    assert model.model.language_model.embed_tokens.weight is table

    plain = full(tiny_llava("Llava", tie=tie)[0])
    if tie:
        plain.lm_head.weight = plain.model.language_model.embed_tokens.weight
    rows = len(plain.lm_head.weight)
    model, ours = add_regions(plain, processor)
    grown = model.model.language_model.embed_tokens.weight
    assert len(grown) == len(model.lm_head.weight) == model.config.text.vocab_size == rows + 1 == len(ours.tokenizer)
    torch.testing.assert_close(grown[-1], grown[:-1].mean(0))
    assert (model.lm_head.weight is grown) == tie


def test_answers_end_where_the_models_own_template_says_nothing(noise_image):
    """A model that is trained on answers without an end never stops; the template of llava-1.5-hf writes none."""
    plain, processor = tiny_llava("Llava")
    processor.tokenizer.add_special_tokens({"eos_token": "</s>"})
    turns = [user_message("What ?", with_image=True), assistant_message("a star")]
    _, ours = add_regions(plain, processor)
    assert "a star</s>" in ours.apply_chat_template([*turns, user_message("And ?", with_image=False)])
    processor.chat_template = processor.chat_template.replace("part['text'] + ' '", "part['text'] + '</s>'")
    _, ours = add_regions(tiny_llava("Llava")[0], processor)
    assert ours.apply_chat_template(turns).count("</s>") == 2  # one that closes answers stays as it is


def test_a_tokenizer_without_padding_can_fill_batches(noise_image):
    plain, processor = tiny_llava("Llava")
    processor.tokenizer.add_special_tokens({"eos_token": "</s>"})
    processor.tokenizer.pad_token = None
    _, ours = add_regions(plain, processor)
    batch = ours([noise_image()] * 2, ["<image>What ?", "<image>What is in the picture ?"], padding=True)
    assert batch["attention_mask"].sum(1).tolist()[0] < batch["attention_mask"].sum(1).tolist()[1]


def test_other_kinds_are_refused_in_one_line():
    with pytest.raises(UserError, match=r"a llava_onevision .*region_prompt: coords.*overlay") as error:
        add_regions(*tiny_llava("LlavaOnevision"))
    assert "\n" not in str(error.value)


def test_another_image_token_is_refused():
    model, processor = tiny_llava("Llava")
    model.config.image_token_index = 3
    with pytest.raises(UserError, match="not the model's image token 3"):
        add_regions(model, processor)
