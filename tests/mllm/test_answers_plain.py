"""Plain LLaVAs of three kinds through the same batches, beside transformers' own generate."""

from importlib.util import find_spec

import pytest
import torch

from regiontower.benchmarks._tiny_llavas import save_as, tiny_llava
from regiontower.mllm import Question, SharedAnswers, answer_questions
from regiontower.mllm.plain_llava import load_llava
from regiontower.vision_towers import UserError

TEXTS = ["What is in the picture ?", "red star ?", "What is the blue star of a red star in the picture on a star ?"]


@pytest.fixture(scope="module", params=["Llava", "LlavaNext", "LlavaOnevision"])
def plain(request):
    return tiny_llava(request.param)


def questions_of(noise_image):
    pictures = [noise_image(*size, seed) for seed, size in enumerate([(120, 90), (56, 112), (112, 112)])]
    return [Question(picture, text) for text in TEXTS for picture in pictures]


def test_plain_llavas_answer_as_transformers_does(plain, noise_image):
    model, processor = plain
    questions = questions_of(noise_image)
    expected = []
    for question in questions:
        content = [{"type": "image"}, {"type": "text", "text": question.text}]
        prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = processor(images=question.image, text=prompt, return_tensors="pt")
        inputs.pop("token_type_ids", None)
        new = model.generate(**inputs, max_new_tokens=7, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        expected.append(processor.tokenizer.batch_decode(new, skip_special_tokens=False)[0])
    answers = answer_questions(model, processor, questions, max_new_tokens=7, batch_size=4)
    special = set(processor.tokenizer.all_special_tokens)
    for answer, text in zip(answers, expected, strict=True):
        words = text.split()
        end = next((index for index, word in enumerate(words) if word in special), len(words))
        assert answer.text == " ".join(words[:end])
    assert len({answer.text for answer in answers}) > 4


def test_likelihoods_of_a_plain_llava(noise_image):
    model, processor = tiny_llava("Llava")
    question = Question(noise_image(), TEXTS[0])
    (found,) = SharedAnswers(model, processor).score([question], ["a red star"])
    prompt = "USER: <image> What is in the picture ? ASSISTANT: a red star "
    inputs = processor(images=question.image, text=prompt, return_tensors="pt")
    with torch.no_grad():
        logits = model(input_ids=inputs["input_ids"], pixel_values=inputs["pixel_values"]).logits[0]
    expected = torch.nn.functional.cross_entropy(logits[-4:-1], inputs["input_ids"][0, -3:])
    assert found.loss == pytest.approx(float(expected), rel=1e-4)


def test_likelihoods_of_another_kind_of_model_are_refused_in_one_sentence(noise_image):
    model, processor = tiny_llava("VipLlava")
    with pytest.raises(UserError, match=r"likelihoods of a VipLlava.* are not computed here; choose tasks"):
        SharedAnswers(model, processor).score([Question(noise_image(), TEXTS[0])], ["a red star"])


def test_a_checkpoint_on_disk(tmp_path, noise_image, tiny_mllm_dir):
    model, processor = tiny_llava("Llava")
    opened, its_processor = load_llava(save_as(model, processor, tmp_path / "llava", "v4"), device="cpu", dtype="bf16")
    assert opened.dtype == torch.bfloat16 and not opened.training
    answer_questions(opened, its_processor, questions_of(noise_image), max_new_tokens=2)
    if find_spec("bitsandbytes") is not None:
        small, _ = load_llava(tmp_path / "llava", device="cpu", quant="int8")
        assert small.model.language_model.layers[0].mlp.up_proj.weight.dtype == torch.int8
        assert small.model.multi_modal_projector.linear_1.weight.dtype == torch.float32
        answer_questions(small, its_processor, questions_of(noise_image), max_new_tokens=2)
    ours, _ = load_llava(tiny_mllm_dir, device="cpu")
    assert ours.config.model_type == "region_llava"
    with pytest.raises(UserError, match="no model can be opened"):
        load_llava(tmp_path / "nothing")
    with pytest.raises(UserError, match="dtype must be"):
        load_llava(tmp_path / "llava", dtype="fp8")


def test_regions_are_said_in_words(noise_image, monkeypatch):
    model, processor = tiny_llava("Llava")
    asked = []
    written = processor.apply_chat_template
    monkeypatch.setattr(
        processor, "apply_chat_template", lambda turns, **rest: (asked.append(turns), written(turns, **rest))[1]
    )
    question = Question(noise_image(120, 60), "What is in <region> ?", [(30, 0, 60, 30)])
    answer_questions(model, processor, [question], max_new_tokens=1)
    assert asked[0][0]["content"][1]["text"] == "What is in [0.25, 0.25, 0.50, 0.50] ?"  # of the padded square
    SharedAnswers(model, processor, box_format="int1000").answer([question], 1)
    assert asked[1][0]["content"][1]["text"] == "What is in [250, 0, 500, 500] ?"
    with pytest.raises(UserError, match="comes with 0 boxes"):
        answer_questions(model, processor, [Question(noise_image(), "What is in <region> ?")])
