"""The page in headless Chromium while something else is going on: other pictures, other questions, a full queue."""

import json
import sys
import threading
from pathlib import Path

import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))
from bad_files import encoded
from browser import FILE_INPUT, LIST, PARTLY_ANSWERED, session_of


def png(width: int) -> bytes:
    return encoded(Image.new("RGB", (width, 60), "red"), "PNG")


def until(page, reached) -> None:
    """Wait for something on the server; the browser goes on meanwhile."""
    for _ in range(1800):
        if reached():
            return
        page.wait_for_timeout(50)
    raise TimeoutError


def test_pictures_chosen_while_one_is_opened_are_not_lost(demo, server, monkeypatch, tmp_path):
    """Not in another order either: the last is what one sees, and no session of the others is left."""
    page, release, opened = demo.page, threading.Event(), []
    really_open, before = server.engine.sessions.open, set(server.engine.sessions._sessions)

    def held_open(image):
        opened.append(image.width)
        assert len(opened) > 1 or release.wait(120)
        return really_open(image)

    monkeypatch.setattr(server.engine.sessions, "open", held_open)
    for width in (91, 92):
        (tmp_path / f"{width}.png").write_bytes(png(width))
    page.set_input_files(FILE_INPUT, tmp_path / "91.png")
    until(page, lambda: opened == [91])
    page.locator(".rt-example").nth(1).click()
    page.set_input_files(FILE_INPUT, tmp_path / "92.png")
    page.wait_for_timeout(500)
    release.set()
    demo.wait_for_width(92)
    assert opened == [91, 92]  # of those that wait, the last
    left = set(server.engine.sessions._sessions) - before
    assert [server.engine.sessions.get(token).image.width for token in left] == [92]
    page.evaluate("() => [1, 2].forEach((index) => document.querySelectorAll('.rt-example')[index].click())")
    until(page, lambda: len(opened) == 4)
    demo.wait_for_width(opened[3])
    assert opened[2] != opened[3]


@pytest.mark.parametrize("how", ["chosen", "pasted"])
def test_a_picture_chosen_while_another_is_uploaded_is_not_lost(demo, tmp_path, how):
    page, routes = demo.page, []
    page.route("**/upload*", lambda route: routes.append(route) if not routes else route.continue_())
    for width in (93, 94):
        (tmp_path / f"{width}.png").write_bytes(png(width))
    page.set_input_files(FILE_INPUT, tmp_path / "93.png")
    until(page, lambda: routes)
    if how == "pasted":
        demo.paste(png(94))
    else:
        page.set_input_files(FILE_INPUT, tmp_path / "94.png")
    page.wait_for_timeout(300)
    routes[0].continue_()
    demo.wait_for_width(94)


def test_another_picture_ends_the_answer_about_the_one_before(demo, server, held_answers):
    page, release = demo.page, threading.Event()
    demo.open_example(1)
    held_answers(release)
    page.fill("#rt-question textarea", LIST)
    page.click("#rt-send")
    page.wait_for_function(PARTLY_ANSWERED)
    demo.paste(png(95))
    demo.wait_for_width(95)
    release.set()
    page.wait_for_selector("#rt-send", state="visible")
    assert page.locator(".rt-turn, .rt-outline, .rt-notice").count() == 0
    demo.ask("Describe the image.")
    assert session_of(server).image.width == 95 and page.locator("#rt-chat-a .rt-turn").count() == 1


def test_a_full_queue_is_said_in_a_sentence_and_nothing_is_lost(demo, server, held_answers):
    """In the page, to programs, and to whoever speaks HTTP; what was typed stays, and can be asked a minute later."""
    gradio_client = pytest.importorskip("gradio_client")
    from gradio_client.utils import QueueError
    from test_http_api import as_text, request

    def post(name: str, data: list):
        kind = {"Content-Type": "application/json"}
        return request(f"{server.url}gradio_api/{name}", json.dumps({"data": data}).encode(), **kind)

    page, release = demo.page, threading.Event()
    demo.open_example(1)
    held_answers(release)
    client = gradio_client.Client(server.url, verbose=False, httpx_kwargs={"timeout": 120})
    sessions = [server.engine.open_image(session_of(server).image) for _ in range(3)]
    jobs = [client.submit(session.token, LIST, api_name="/ask") for session in sessions[:2]]
    until(page, lambda: all(session.busy for session in sessions[:2]))
    waiting = server.engine.limits.waiting
    for _ in range(waiting):
        assert post("call/ask", [sessions[2].token, LIST, [], "", "", 16])[0] == 200
    until(page, lambda: len(server.app._queue) == waiting)

    says = "The demo is busy: 64 requests are waiting already and this one was not taken; try again in a minute."
    page.fill("#rt-question textarea", "What is in [1]?")
    page.click("#rt-send")
    page.wait_for_selector(f"text={says}")
    assert page.input_value("#rt-question textarea") == "What is in [1]?" and page.locator(".rt-turn").count() == 0
    page.wait_for_function("document.querySelector('#rt-send').innerText === 'Ask'")
    with page.expect_response("**/queue/join*") as answer:
        demo.paste(png(96))
    assert answer.value.status == 429 and answer.value.json() == {"detail": says}
    with pytest.raises(QueueError, match="Queue is full"):
        client.predict(as_text(Image.new("RGB", (60, 60))), "a.png", api_name="/open_picture")
    status, body = post("call/models", [])
    assert status == 503 and says in body.decode()
    client.predict(sessions[0].token, api_name="/stop")  # an answer can be stopped all the same
    assert post("call/close", [sessions[2].token])[0] == 200  # what waits gets a sentence when its turn comes
    release.set()
    assert [job.result(120)["state"] for job in jobs] == ["stopped", "done"]
    until(page, lambda: len(server.app._queue) == 0)
    demo.ask()
    assert page.locator("#rt-chat-a .rt-turn").count() == 1
    demo.paste(png(96))
    demo.wait_for_width(96)
