"""Many questions at once give the answers of one at a time, and run the tower once a picture."""

import random

import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from regiontower.benchmarks._tiny_llavas import tiny_llava
from regiontower.mllm import Question, SharedAnswers, add_regions, answer_questions, build_mllm
from regiontower.mllm.answers import decode_answer, model_inputs, user_prompt
from regiontower.mllm.batched_plan import plan_batches
from regiontower.mllm.batched_prefix import compute_prefixes
from regiontower.vision_towers import RiceVisionConfig, RiceVisionModel, UserError

TEXTS = [
    ("Where is the star?", []),
    ("What is in <region>?", [(10, 10, 50, 50)]),
    ("Where is the red star? Or a blue heart, or none?", []),
    ("What is it?", []),
    ("<region> <region> or <region>?", [(5, 5, 60, 40), (0, 0, 60, 90), (30, 20, 58, 78)]),
    ("What is in <region>?", [(0, 30, 40, 80)]),
    ("What is in <region> or <region>? Read the sign. 12, 345, 678", [(1, 2, 30, 40), (20, 10, 50, 60)]),
]


def mixed_questions(noise_image, sizes=((120, 90), (90, 120), (64, 64), (200, 90))):
    """Every text about every picture, and single questions about further ones, shuffled."""
    pictures = [noise_image(*size, seed) for seed, size in enumerate(sizes)]
    questions = [Question(picture, text, boxes) for picture in pictures for text, boxes in TEXTS]
    questions += [Question(noise_image(100, 100, 10 + n), *TEXTS[n % len(TEXTS)]) for n in range(4)]
    random.Random(0).shuffle(questions)
    return questions


def one_by_one(model, processor, questions, max_new_tokens):
    """Plain `generate` on each prompt alone; its answers with all logits."""
    answers = []
    for question in questions:
        inputs = processor([question.image], [user_prompt(processor, question.text)], boxes=[question.boxes])
        output = model.generate(
            **model_inputs(model, inputs),
            max_new_tokens=max_new_tokens,
            return_dict_in_generate=True,
            output_logits=True,
        )
        ids = output.sequences[0, inputs["input_ids"].shape[1] :].tolist()
        chances = [float(step[0].softmax(-1)[token]) for step, token in zip(output.logits, ids, strict=True)]
        answers.append(decode_answer(processor, ids, chances, processor.frame(question.image.size)))
    return answers


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_batches_answer_as_one_prompt_alone_does(tiny_mllm, noise_image, batch_size):
    model, processor = tiny_mllm
    questions = mixed_questions(noise_image)
    expected = one_by_one(model, processor, questions, 8)
    answers = answer_questions(model, processor, questions, max_new_tokens=8, batch_size=batch_size)
    assert [answer.text for answer in answers] == [answer.text for answer in expected]
    assert len({answer.text for answer in answers}) > len(questions) // 2  # pictures, words and boxes matter


@pytest.mark.parametrize(
    "choices",
    [
        {"row_end": True},  # each picture has its own number of tokens
        {"projector": "merge2x2_mlp", "image_position": "sin2d"},
        {"region_prompt": "tokens"},
        {"region_prompt": "coords"},
        {"region_prompt": "overlay"},  # boxes lie in the picture: the same picture is another one with other boxes
    ],
    ids=lambda choices: "-".join(map(str, choices.values())),
)
def test_other_inputs_and_prompts(make_tiny_mllm, noise_image, choices):
    model, processor = make_tiny_mllm(**choices)
    questions = mixed_questions(noise_image)
    expected = one_by_one(model, processor, questions, 6)
    answers = answer_questions(model, processor, questions, max_new_tokens=6, batch_size=6)
    assert [answer.text for answer in answers] == [answer.text for answer in expected]


def test_a_sliding_window_shorter_than_the_prompt(tiny_tokenizer, noise_image):
    torch.manual_seed(0)
    tower = RiceVisionModel(
        RiceVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            patch_size=8,
            image_size=64,
        )
    )
    config = Gemma3TextConfig(
        vocab_size=len(tiny_tokenizer),
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        query_pre_attn_scalar=12,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention"] * 2,
        initializer_range=0.3,
        eos_token_id=tiny_tokenizer.convert_tokens_to_ids("<|end|>"),
        pad_token_id=tiny_tokenizer.pad_token_id,
    )
    language_model = Gemma3ForCausalLM(config)
    for name, weight in language_model.named_parameters():
        if "post_" in name:
            torch.nn.init.normal_(weight, mean=8.0, std=4.0)
    model, processor = build_mllm(tower, language_model, tiny_tokenizer)
    model.eval()
    questions = mixed_questions(noise_image)[:16]
    expected = one_by_one(model, processor, questions, 12)
    answers = answer_questions(model, processor, questions, max_new_tokens=12, batch_size=5)
    assert [answer.text for answer in answers] == [answer.text for answer in expected]


def test_tower_and_prefix_run_once_a_picture_whatever_the_batches(tiny_mllm, noise_image, monkeypatch):
    model, processor = tiny_mllm
    seen, prefixes, image_ids = [], [], []

    def spy(model, reader, pictures, beginnings):
        prefixes.extend(beginnings)
        return compute_prefixes(model, reader, pictures, beginnings)

    def count(_, inputs):
        image_ids.append(int((inputs[0] == processor.image_token_id).sum()))

    monkeypatch.setattr("regiontower.mllm.batched_answers.compute_prefixes", spy)
    handles = [
        model.model.vision_tower.encoder.layers[0].register_forward_hook(
            lambda _, inputs, __: seen.append(len(inputs[0]))
        ),
        model.get_input_embeddings().register_forward_pre_hook(count),
    ]
    questions = [Question(noise_image(seed=seed), text, boxes) for seed in range(3) for text, boxes in TEXTS]
    try:  # 21 questions in 5 batches: two pictures are asked about in two batches each
        answer_questions(model, processor, questions, max_new_tokens=2, batch_size=5)
    finally:
        for handle in handles:
            handle.remove()
    assert sum(seen) == 3  # though each question holds a copy of its own
    assert len(prefixes) == len(set(prefixes)) == 3
    assert sum(image_ids) == 3 * processor.image_tokens(processor.frame((120, 90)))


def test_views_of_llava_next(noise_image):
    model, processor = add_regions(*tiny_llava("LlavaNext"))
    model.eval()
    texts = [("What is in the picture ?", []), ("What is in <region> ?", [(5, 5, 60, 40)])]
    texts.append(("<region> of <region> of the blue star ?", [(1, 2, 50, 40), (30, 20, 50, 60)]))
    pictures = [noise_image(*size, seed) for seed, size in enumerate([(120, 90), (60, 112), (112, 112), (120, 90)])]
    questions = [Question(picture, *about) for about in texts for picture in pictures]
    expected = one_by_one(model, processor, questions, 6)
    answers = answer_questions(model, processor, questions, max_new_tokens=6, batch_size=5)
    assert [answer.text for answer in answers] == [answer.text for answer in expected]
    assert len({answer.text for answer in answers}) > 4


def test_boxes_and_scores_come_from_the_same_probabilities(tiny_mllm, noise_image, monkeypatch):
    """Every answer is read as one box, whose score is the mean over its tokens."""
    model, processor = tiny_mllm
    questions = mixed_questions(noise_image)[:7]
    seen = []

    def spy(processor, ids, probabilities, frame):
        seen.append([round(value, 5) for value in probabilities[: len(ids)]])
        return decode_answer(processor, ids, probabilities, frame)

    monkeypatch.setattr("regiontower.mllm.batched_reader.decode_answer", spy)
    answer_questions(model, processor, questions, max_new_tokens=5, batch_size=1)
    alone = list(seen)
    seen.clear()
    answer_questions(model, processor, questions, max_new_tokens=5, batch_size=7)
    assert sorted(map(len, alone)) and all(0 < value <= 1 for row in alone for value in row)
    # Rows that ended wait for the others: their padding has no meaning.
    shortened = [row[: len(other)] for row, other in zip(seen, alone, strict=True)]
    for mine, theirs in zip(shortened, alone, strict=True):
        assert mine == pytest.approx(theirs, abs=2e-4)


def test_bfloat16_under_inference_mode(make_tiny_mllm, noise_image):
    model, processor = make_tiny_mllm()
    model.to(torch.bfloat16)
    flags = []
    handle = model.model.language_model.layers[0].register_forward_hook(
        lambda _, inputs, __: flags.append((torch.is_inference_mode_enabled(), inputs[0].dtype))
    )
    try:
        answers = answer_questions(model, processor, mixed_questions(noise_image)[:9], max_new_tokens=4, batch_size=4)
    finally:
        handle.remove()
    assert set(flags) == {(True, torch.bfloat16)}
    assert len(answers) == 9


def test_a_bad_question_says_so(tiny_mllm, noise_image):
    model, processor = tiny_mllm
    with pytest.raises(UserError, match="comes with 0 boxes"):
        answer_questions(model, processor, [Question(noise_image(), "What is in <region>?")])
    with pytest.raises(UserError, match="outside"):
        answer_questions(model, processor, [Question(noise_image(), "What is in <region>?", [(500, 500, 600, 600)])])


def test_likelihoods_are_those_of_the_whole_conversation(tiny_mllm, noise_image):
    model, processor = tiny_mllm
    picture, other = noise_image(), noise_image(90, 120, 1)
    questions = [
        Question(picture, "What is in <region>?", [(10, 10, 50, 50)]),
        Question(picture, "What is in <region>?", [(10, 10, 50, 50)]),
        Question(other, "Where is the star?"),
        Question(picture, "Where is the red star?"),
    ]
    answers = ["a blue heart", "none", "[12, 345, 678, 1000]", ""]
    found = SharedAnswers(model, processor).score(questions, answers)
    for question, answer, likelihood in zip(questions, answers, found, strict=True):
        asked = user_prompt(processor, question.text)
        turns = [{"role": "user", "content": "<image>" + question.text}, {"role": "assistant", "content": answer}]
        answered = processor.apply_chat_template(turns)
        inputs = processor([question.image], [answered], boxes=[question.boxes])
        ids, start = (
            inputs["input_ids"],
            processor([question.image], [asked], boxes=[question.boxes])["input_ids"].shape[1],
        )
        with torch.no_grad():
            logits = model(**inputs).logits[0, start - 1 : -1]
        target = ids[0, start:]
        assert likelihood.loss == pytest.approx(float(torch.nn.functional.cross_entropy(logits, target)), rel=1e-4)
        assert likelihood.greedy == bool((logits.argmax(-1) == target).all())


def test_the_models_own_answer_is_greedy_and_another_is_not(tiny_mllm, noise_image):
    model, processor = tiny_mllm
    question = Question(noise_image(), "Where is the star?")
    turns = [{"role": "user", "content": "<image>" + question.text}, {"role": "assistant", "content": "a sign"}]
    start = processor([question.image], [user_prompt(processor, question.text)])["input_ids"].shape[1]
    own = processor([question.image], [processor.apply_chat_template(turns)])["input_ids"][0, start:]

    def prefer(module, inputs, logits):
        """A head whose first choices are the words of "a sign" and its end, one after the other."""
        wanted = torch.nn.functional.one_hot(own[: len(logits)], logits.shape[-1])
        return logits + 100 * torch.nn.functional.pad(wanted, (0, 0, 0, len(logits) - len(wanted)))

    handle = model.lm_head.register_forward_hook(prefer)
    try:
        likely, unlikely = SharedAnswers(model, processor).score([question] * 2, ["a sign", "none"])
    finally:
        handle.remove()
    assert likely.greedy and likely.loss < 0.01
    assert not unlikely.greedy and unlikely.loss > 10


def test_the_plan():
    pictures, lengths = list("abacab"), [5, 9, 7, 6, 5, 3]
    assert plan_batches(pictures, lengths, 2) == [[1, 5], [2, 0], [4, 3]]
    assert plan_batches([1, 2, 1, 2], [4, 4, 4, 4], 3) == [[0, 2, 1], [3]]
    assert plan_batches([], [], 3) == []
