"""Sessions, conversations and what can be done with them, without any page; on tiny random models."""

import threading
import time
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image

from regiontower.demo.conversation import REGION_PROMPTS
from regiontower.demo.engine import Engine
from regiontower.demo.limits import Limits
from regiontower.demo.models import menu_names
from regiontower.mllm import ChatSession
from regiontower.vision_towers import UserError, encode_regions

MARKS = [{"number": 1, "box_xyxy": [10, 10, 60, 50]}, {"number": 2, "point_xy": [80, 40], "label": "dot"}]
QUESTIONS = ["What is in [1]?", "Find the star", "Is [dot] in [1]?"]


def last(steps):
    *_, turns = steps
    return turns


@pytest.fixture
def token(engine, noise_image):
    return engine.open_image(noise_image()).token


def encodings(model):
    """How often the tower of a model runs, as a list that grows."""
    runs: list = []
    model.model.model.vision_tower.encoder.layers[0].register_forward_hook(lambda *_: runs.append(1))
    return runs


def test_turns_answer_as_a_chat_session_does_and_the_tower_runs_once(engine, token, noise_image):
    one = engine.models[0]
    runs = encodings(one)
    answers = [last(engine.ask(token, ["one"], q, MARKS, max_new_tokens=6))["one"] for q in QUESTIONS]
    engine.similarity(token, "one", MARKS, 1)
    engine.tokens(token, "one")
    assert len(runs) == 1
    chat = ChatSession(one.model, one.processor, noise_image(), max_new_tokens=6)
    box, dot = (10, 10, 60, 50), (77.5, 37.5, 82.5, 42.5)
    expected = [
        chat.ask("What is in <region>?", [box]),
        chat.ask("Where is star?"),
        chat.ask("Is <region> in <region>?", [dot, box]),
    ]
    assert [turn.answer for turn in answers] == [answer.text for answer in expected]
    assert all(turn.state == "done" and turn.first_token_seconds is not None for turn in answers)


def test_a_stream_grows_and_its_last_turn_is_whole(engine, token):
    pieces = []
    for question in ("Describe it.", "Find the star", "Hello", "What colour?"):  # random weights say anything
        texts = [turns["one"].answer for turns in engine.ask(token, ["one"], question, max_new_tokens=16)]
        whole = texts.pop()
        assert texts[0] == "" and all(b.startswith(a) for a, b in pairwise(texts))
        assert texts[-1].strip() == whole
        pieces.append(len(set(texts)))
    assert max(pieces) >= 3


def test_two_models_answer_side_by_side_as_each_does_alone(engine, token, noise_image):
    both = last(engine.ask(token, ["one", "two"], QUESTIONS[0], MARKS, max_new_tokens=6))
    alone = {
        name: last(engine.ask(engine.open_image(noise_image()).token, [name], QUESTIONS[0], MARKS, max_new_tokens=6))
        for name in ("one", "two")
    }
    for name in ("one", "two"):
        assert both[name].answer == alone[name][name].answer
    assert both["one"].answer != both["two"].answer


def test_sessions_do_not_mix_when_they_answer_at_the_same_time(tiny_models, noise_image):
    engine = Engine(tiny_models, Limits(sessions=20))
    pictures = [noise_image(seed=seed) for seed in range(8)]

    def talk(picture):
        token = engine.open_image(picture).token
        return [last(engine.ask(token, ["one"], q, MARKS, max_new_tokens=6))["one"].answer for q in QUESTIONS]

    alone = [talk(picture) for picture in pictures]
    assert len({tuple(answers) for answers in alone}) > 4  # or a mix-up could not be seen
    together: dict[int, list[str]] = {}
    threads = [threading.Thread(target=lambda i=i: together.update({i: talk(pictures[i])})) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [together[i] for i in range(8)] == alone


def test_a_stopped_turn_is_shown_and_forgotten_by_the_model(engine, token, noise_image):
    first = last(engine.ask(token, ["one"], QUESTIONS[0], MARKS, max_new_tokens=6))["one"]
    steps = engine.ask(token, ["one"], QUESTIONS[1], MARKS, max_new_tokens=16)
    next(steps)
    engine.stop(token)
    turns = last(steps)
    assert turns["one"].state == "stopped"
    assert [turn.state for turn in engine.sessions.get(token).conversations["one"].turns] == ["done", "stopped"]
    again = last(engine.ask(token, ["one"], QUESTIONS[2], MARKS, max_new_tokens=6))["one"]
    other = engine.open_image(noise_image()).token
    assert last(engine.ask(other, ["one"], QUESTIONS[0], MARKS, max_new_tokens=6))["one"].answer == first.answer
    assert last(engine.ask(other, ["one"], QUESTIONS[2], MARKS, max_new_tokens=6))["one"].answer == again.answer


def test_a_page_that_is_closed_in_the_middle_frees_its_session(engine, token):
    steps = engine.ask(token, ["one", "two"], QUESTIONS[0], MARKS, max_new_tokens=16)
    next(steps)
    with pytest.raises(UserError, match="still being answered"):
        next(engine.ask(token, ["one"], QUESTIONS[1], MARKS))
    steps.close()
    assert last(engine.ask(token, ["one"], QUESTIONS[1], MARKS, max_new_tokens=6))["one"].state == "done"


def test_mistakes_leave_the_conversation_as_it_was(engine, token):
    last(engine.ask(token, ["one"], QUESTIONS[0], MARKS, max_new_tokens=6))
    for question, marks, names, says in (
        ("What is in [9]?", MARKS, ["one"], "no mark"),
        ("", MARKS, ["one"], "type a question"),
        ("Hi", [{"number": 1}], ["one"], "needs either"),
        ("Hi", MARKS, ["three"], "no model 'three'"),
        ("Hi", MARKS, [], "choose a model"),
        ("star " * 59, MARKS, ["one"], None),
    ):
        if says:
            with pytest.raises(UserError, match=says):
                last(engine.ask(token, names, question, marks))
    with pytest.raises(UserError, match="region_prompt must be one of"):
        last(engine.ask(token, ["one"], "Hi", MARKS, region_prompt="drawn"))
    assert len(engine.sessions.get(token).conversations["one"].turns) == 1
    last(engine.ask(token, ["one"], QUESTIONS[1], MARKS, max_new_tokens=6))


def test_a_conversation_has_an_end(engine, token):
    for _ in range(4):
        last(engine.ask(token, ["one"], "Hi", max_new_tokens=1))
    with pytest.raises(UserError, match="4 turns"):
        last(engine.ask(token, ["one"], "Hi"))
    engine.restart(token)
    assert last(engine.ask(token, ["one"], "Hi", max_new_tokens=1))["one"].state == "done"


@pytest.mark.parametrize("region_prompt", REGION_PROMPTS)
def test_every_region_prompt_can_be_chosen(engine, token, region_prompt):
    last(engine.ask(token, ["one"], "Hi", max_new_tokens=1, region_prompt="coords"))
    turns = [
        last(engine.ask(token, ["one"], q, MARKS, region_prompt=region_prompt, max_new_tokens=4))["one"]
        for q in QUESTIONS[::2]
    ]
    conversation = engine.sessions.get(token).conversations["one"]
    kept = 1 if region_prompt == "coords" else 0  # another prompt begins a new conversation
    assert len(conversation.turns) == kept + 2 and conversation.turns[-1] is turns[1]
    assert engine.models[0].processor.region_prompt == "tokens+coords"  # the model's own is left alone
    text = engine.models[0].processor.tokenizer.decode(conversation.chat._prefix.ids[0])
    assert ("<region>" in text) == ("tokens" in region_prompt)
    assert ("the red box" in text) == (region_prompt == "overlay")


def test_a_bug_in_the_model_fails_one_turn_and_nothing_else(engine, token, monkeypatch):
    monkeypatch.setattr(engine.models[0].model, "forward", lambda **_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        last(engine.ask(token, ["one"], "Hi"))
    turns = engine.sessions.get(token).conversations["one"].turns
    assert turns[0].state == "failed" and "log of the server" in turns[0].error
    monkeypatch.undo()
    assert last(engine.ask(token, ["one"], "Hi", max_new_tokens=2))["one"].state == "done"


def test_sessions_are_found_by_their_token_alone_and_the_oldest_goes_first(engine, noise_image):
    tokens = []
    for _ in range(4):
        tokens.append(engine.open_image(noise_image()).token)
        time.sleep(0.01)
    assert len(engine.sessions) == 3 and len(set(tokens)) == 4 and min(map(len, tokens)) >= 32
    with pytest.raises(UserError, match="no longer kept"):
        engine.sessions.get(tokens[0])
    for bad in ("", None, "x"):
        with pytest.raises(UserError):
            engine.sessions.get(bad)
    engine.sessions.close(tokens[1])
    with pytest.raises(UserError, match="no longer kept"):
        engine.stop(tokens[1])


def test_a_session_that_answers_is_not_thrown_out(engine, noise_image):
    tokens = [engine.open_image(noise_image()).token for _ in range(3)]
    streams = [engine.ask(token, ["one"], "Hi", max_new_tokens=16) for token in tokens]
    for stream in streams:
        next(stream)
    with pytest.raises(UserError, match="busy"):
        engine.open_image(noise_image())
    for stream in streams:
        assert last(stream)["one"].state == "done"
    engine.open_image(noise_image())


def test_idle_sessions_go(tiny_models, noise_image):
    engine = Engine(tiny_models, Limits(idle_seconds=0.0))
    first = engine.open_image(noise_image()).token
    time.sleep(0.01)
    engine.open_image(noise_image())
    assert len(engine.sessions) == 1
    with pytest.raises(UserError, match="no longer kept"):
        engine.sessions.get(first)


def test_the_heat_map_is_the_towers_cosine_at_the_right_place(engine, noise_image):
    """A picture of two halves: what is like a box in the left half is the left half, whatever the letterbox adds."""
    pixels = np.zeros((40, 120, 3), dtype=np.uint8)
    pixels[:, 60:] = np.random.default_rng(0).integers(0, 256, (40, 60, 3))
    image = Image.fromarray(pixels)
    token = engine.open_image(image).token
    heat = engine.similarity(token, "one", [{"number": 1, "box_xyxy": [2, 2, 50, 38]}], None)
    assert heat.size == image.size
    overlaid = (np.asarray(heat, dtype=float) - 0.4 * pixels) / 0.6  # without the picture under it
    yellow = overlaid[..., 0] + overlaid[..., 1] - overlaid[..., 2]
    assert yellow[:, 5:45].mean() > yellow[:, 75:115].mean() + 30
    # The same cosines by the tower's public function, on one patch in each half.
    one = engine.models[0]
    chat = engine.sessions.get(token).conversations["one"].chat
    fitted = one.processor.normalise(np.asarray(one.processor.fit(image)[0]).transpose(2, 0, 1)[None])
    boxes = torch.tensor([[1.0, 22.0, 27.0, 41.0], [8.0, 24.0, 32.0, 40.0], [40.0, 24.0, 64.0, 40.0]])
    with torch.inference_mode():
        rows = encode_regions(one.model.model.vision_tower, fitted, [boxes])[0]
        kept = one.model.model.vision_tower(features=chat.features, boxes=boxes[None]).region_embeds[0]
    torch.testing.assert_close(kept, rows, atol=1e-4, rtol=1e-4)


def test_tokens_as_colours_have_the_pictures_size_and_differ_where_it_differs(engine):
    pixels = np.zeros((64, 64, 3), dtype=np.uint8)
    pixels[:, 32:] = 255
    token = engine.open_image(Image.fromarray(pixels)).token
    colours = np.asarray(engine.tokens(token, "one"), dtype=float)
    assert colours.shape == (64, 64, 3)
    assert np.abs(colours[:, 8:24].mean((0, 1)) - colours[:, 40:56].mean((0, 1))).max() > 40


def test_there_must_be_a_mark_to_look_for(engine, token):
    with pytest.raises(UserError, match="draw a box or a point first"):
        engine.similarity(token, "one", [], None)
    with pytest.raises(UserError, match=r"no mark \[7\]"):
        engine.similarity(token, "one", MARKS, 7)


def test_menu_names_are_short_and_tell_models_apart():
    assert menu_names(["nano", "/a/b/run", "org/name"]) == ["nano", "run", "name"]
    assert menu_names(["/a/x/run", "/a/y/run"]) == ["x/run", "y/run"]
    with pytest.raises(UserError, match="named twice"):
        menu_names(["nano", "nano"])
