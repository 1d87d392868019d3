"""ChatSession: kept prefix, streamed tokens, and what happens when a turn fails or is stopped."""

import copy
import random

import pytest
import torch

from regiontower.mllm import ChatSession, Question, answer_questions
from regiontower.mllm.answers import decode_answer
from regiontower.mllm.boxes import Boxes, ImageFrame
from regiontower.mllm.draw import draw_boxes
from regiontower.mllm.greedy import BYTE_TOKEN, is_settled
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


def test_text_that_counts_as_settled_is_not_taken_back(tiny_mllm):
    tokenizer = tiny_mllm[1].tokenizer
    byte_tokens = [token for text, token in tokenizer.get_vocab().items() if BYTE_TOKEN.fullmatch(text)]
    assert byte_tokens, "this tokenizer should have some"
    drawn = random.Random(0)
    for _ in range(200):
        ids = [drawn.choice(byte_tokens) if drawn.random() < 0.5 else drawn.randrange(len(tokenizer)) for _ in range(8)]
        whole = tokenizer.decode(ids)
        for end in range(1, len(ids)):
            text = tokenizer.decode(ids[:end])
            assert not is_settled(tokenizer, ids[:end], text) or whole.startswith(text)


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


def test_with_overlay_boxes_are_drawn_into_the_picture_and_the_conversation_goes_on(make_tiny_mllm, noise_image):
    model, processor = make_tiny_mllm(region_prompt="overlay")
    encoded = []
    handle = model.model.vision_tower.encoder.layers[0].register_forward_hook(lambda *_: encoded.append(1))
    session = ChatSession(model, processor, noise_image(), max_new_tokens=6)
    boxes: list = []
    runs = []
    for text, new in TURNS:
        boxes += new
        answer, before = session.ask(text, new), len(encoded)
        runs.append(before)
        end = session._prefix.ids.shape[1] - len(session.last_answer_ids)
        ids = session._prefix.ids[:, :end]
        drawn = draw_boxes(noise_image(), Boxes(boxes))
        inputs = processor([drawn], ["<image>"])
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=inputs["pixel_values"],
            max_new_tokens=6,
        )
        new_ids = output[0, end:].tolist()
        assert decode_answer(processor, new_ids, [1.0] * len(new_ids), session.frame).text == answer.text
        assert "the red box" in processor.tokenizer.decode(ids[0])
        encoded[before:] = []
    handle.remove()
    assert runs == [2, 2, 3]  # once for the bare picture, then once for every turn that names new boxes
    with pytest.raises(UserError, match="6 colours"):
        session.ask("<region>" * 4, [(0, 0, 40, 40)] * 4)
    fresh = ChatSession(model, processor, noise_image(), max_new_tokens=6)
    fresh.ask(*TURNS[0])
    session.restart(processor)
    session.ask(*TURNS[0])
    assert session.ask(*TURNS[1]).text == fresh.ask(*TURNS[1]).text


def test_a_restarted_session_is_a_new_one_on_the_same_features(tiny_mllm, noise_image, session):
    model, processor = tiny_mllm
    session.ask(*TURNS[0])
    features = session.features
    coords = copy.copy(processor)
    coords.region_prompt = "coords"
    session.restart(coords)
    fresh = ChatSession(model, coords, noise_image(), max_new_tokens=6)
    assert session.ask(*TURNS[2]).text == fresh.ask(*TURNS[2]).text
    assert session.features is features


def test_a_conversation_longer_than_the_model_reads_is_refused_and_stays_as_it_was(tiny_mllm, noise_image):
    model, _ = tiny_mllm
    session = ChatSession(*tiny_mllm, noise_image(), max_new_tokens=6)
    first = session.ask(*TURNS[0])
    with pytest.raises(UserError, match=f"reads {model.config.text.max_position_embeddings}"):
        session.ask("star " * 1100)
    session.restart(session.processor)
    assert session.ask(*TURNS[0]).text == first.text
