"""A demo of two tiny models, and one server of the packaged models for all tests that need a page or the HTTP API."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from browser import DemoPage, chromium


@pytest.fixture(scope="session")
def tiny_models(make_tiny_mllm):
    """Two models of one kind on two towers: do not change them."""
    from regiontower.demo.models import DemoModel

    return [DemoModel("one", *make_tiny_mllm(0)), DemoModel("two", *make_tiny_mllm(1))]


@pytest.fixture
def engine(tiny_models):
    from regiontower.demo.engine import Engine
    from regiontower.demo.limits import Limits

    return Engine(tiny_models, Limits(sessions=3, marks=5, question_chars=300, turns=4, new_tokens=16))


@pytest.fixture(scope="session")
def server():
    """The demo as the command starts it, on a free port."""
    pytest.importorskip("gradio", reason="Gradio is not installed (extra: demo)")
    from regiontower.demo.serve import launch
    from regiontower.vision_towers.packaged import packaged_models

    if not {"nano", "nano-clip"} <= set(packaged_models()):
        pytest.skip("the packaged models are not here")
    running = launch(["nano", "nano-clip"], device="cpu", dtype="fp32")
    yield running
    running.close()


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium."""
    with chromium() as running:
        yield running


@pytest.fixture
def demo(browser, server):
    """The page, fresh; at its end nothing may have failed in it, and nothing been fetched from elsewhere."""
    page = DemoPage(browser, server.url)
    yield page
    assert page.errors == [] and page.elsewhere == []
    page.close()


@pytest.fixture
def held_answers(server, monkeypatch):
    """`held_answers(event)`: the first model's answers wait at their sixth token for it from then on."""
    model, events, tokens = server.engine.models[0].model, [], {}
    forward = model.forward

    def hold(event):
        events.append(event)

        def held(input_ids, **options):
            # Not by thread: Gradio takes every piece of an answer in another one.
            answer = next(id(value) for value in options.values() if hasattr(value, "get_seq_length"))
            tokens[answer] = 1 if input_ids.shape[1] > 1 else tokens[answer] + 1
            if tokens[answer] == 6:
                assert event.wait(120)
            return forward(input_ids=input_ids, **options)

        monkeypatch.setattr(model, "forward", held)

    yield hold
    for event in events:  # nothing of a test that failed shall hold the next
        event.set()
