"""ChatSession: kept prefix, streamed tokens, and what happens when a turn fails or is stopped."""

import pytest
import torch

from regiontower.mllm import ChatSession, Question, answer_questions
from regiontower.mllm.answers import decode_answer
from regiontower.mllm.boxes import ImageFrame
from regiontower.vision_towers import UserError

TURNS = [
    ("What is in <region>?", [(10, 10, 50, 50)]),
    ("Where is the star?", []),
    ("<region> or <region>?", [(0, 0, 40, 40), (60, 30, 110, 80)]),
]


@pytest.fixture
def session(tiny_mllm, noise_image):
    model, processor = tiny_mllm
    return ChatSession(model, processor, noise_image(), max_new_tokens=6)


def rerun(tiny_mllm, image, turns, answers):
    """The last turn's answer with nothing kept: the whole conversation in one prompt."""
    model, processor = tiny_mllm
    messages = []
    for number, (text, _) in enumerate(turns):
        content = [{"type": "image"}] if number == 0 else []
        messages.append({"role": "user", "content": [*content, {"type": "text", "text": text}]})
        if number < len(answers):
            messages.append({"role": "assistant", "content": [{"type": "text", "text": answers[number]}]})
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    boxes = [box for _, row in turns for box in row]
    inputs = processor([image], [prompt], boxes=[boxes])
    ids = model.generate(**inputs, max_new_tokens=6)[0, inputs["input_ids"].shape[1] :].tolist()
    return decode_answer(processor, ids, [1.0] * len(ids), processor.frame(image.size)).text


def test_each_turn_equals_a_rerun_with_nothing_kept(tiny_mllm, noise_image, session):
    model, processor = tiny_mllm
    boxes: list = []
    for number, (text, new) in enumerate(TURNS):
        boxes += new
        kept = session._prefix.ids.shape[1]
        answer = session.ask(text, new)
        assert number == 0 or kept > 0
        # The very ids of the conversation: an answer of a random model does not survive decoding and tokenising again.
        end = session._prefix.ids.shape[1] - len(session.last_answer_ids)
        ids = session._prefix.ids[:, :end]
        inputs = processor([noise_image()], ["<image>" + "<region>" * len(boxes)], boxes=[boxes])
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            **{name: inputs[name] for name in ("pixel_values", "boxes", "region_counts")},
            max_new_tokens=6,
        )
        new_ids = output[0, end:].tolist()
        assert decode_answer(processor, new_ids, [1.0] * len(new_ids), session.frame).text == answer.text


def test_the_tower_runs_once_a_conversation(tiny_mllm, noise_image):
    model, processor = tiny_mllm
    calls = []
    first_layer = model.model.vision_tower.encoder.layers[0]
    handle = first_layer.register_forward_hook(lambda *_: calls.append(1))
    try:
        session = ChatSession(model, processor, noise_image(), max_new_tokens=3)
        for text, boxes in TURNS:
            session.ask(text, boxes)
    finally:
        handle.remove()
    assert len(calls) == 1


def test_first_turn_equals_answer_questions_and_streams_the_same_text(tiny_mllm, noise_image, session):
    model, processor = tiny_mllm
    text, boxes = TURNS[0]
    pieces = list(session.stream(text, boxes))
    single = answer_questions(model, processor, [Question(noise_image(), text, boxes)], max_new_tokens=6)[0]
    assert session.last_answer.text == single.text
    assert "".join(pieces).strip() == single.text


def test_a_bad_turn_leaves_the_conversation_as_it_was(tiny_mllm, noise_image, session):
    first = session.ask(*TURNS[0])
    with pytest.raises(UserError, match="comes with 0 boxes"):
        session.ask("What is in <region>?")
    with pytest.raises(UserError, match="outside"):
        session.ask("What is in <region>?", [(500, 500, 600, 600)])
    fresh = ChatSession(*tiny_mllm, noise_image(), max_new_tokens=6)
    assert fresh.ask(*TURNS[0]).text == first.text
    assert fresh.ask(*TURNS[2]).text == session.ask(*TURNS[2]).text


def test_a_stopped_turn_can_be_asked_again(tiny_mllm, noise_image, session):
    session.ask(*TURNS[0])
    stream = session.stream(*TURNS[2])
    next(stream)
    stream.close()
    fresh = ChatSession(*tiny_mllm, noise_image(), max_new_tokens=6)
    fresh.ask(*TURNS[0])
    assert session.ask(*TURNS[2]).text == fresh.ask(*TURNS[2]).text


def test_a_template_that_rewrites_earlier_turns_still_gets_right_answers(make_tiny_mllm, noise_image):
    model, processor = make_tiny_mllm()
    rewriting = processor.chat_template.replace("{%- for", "{{- messages | length }}{%- for", 1)
    rewriting = rewriting if rewriting != processor.chat_template else "{{ messages | length }}" + rewriting
    processor.chat_template = rewriting
    session = ChatSession(model, processor, noise_image(), max_new_tokens=6)
    raw = []
    for number, (text, boxes) in enumerate(TURNS):
        answer = session.ask(text, boxes)
        assert answer.text == rerun((model, processor), noise_image(), TURNS[: number + 1], raw)
        raw.append(session._messages[-1]["content"])


def test_boxes_in_an_answer_carry_the_mean_probability_of_their_tokens(tiny_mllm):
    _, processor = tiny_mllm
    text = "It is at [100, 200, 300, 400]."
    ids = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    end = processor.tokenizer.convert_tokens_to_ids("<|end|>")
    first = next(i for i in range(len(ids)) if "[" in processor.tokenizer.decode(ids[: i + 1]))
    probabilities = [0.0 if i < first else 0.5 for i in range(len(ids))]
    answer = decode_answer(processor, [*ids, end, end], [*probabilities, 1.0, 1.0], ImageFrame.letterbox((100, 50), 64))
    assert answer.text == text and answer.boxes.status == "boxes"
    assert answer.boxes.scores == [0.5]


def test_overlay_is_refused(make_tiny_mllm, noise_image):
    model, processor = make_tiny_mllm(region_prompt="overlay")
    with pytest.raises(UserError, match="overlay"):
        ChatSession(model, processor, noise_image())
