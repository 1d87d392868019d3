"""What stands before Gradio, on an application of three lines: sizes, files, and the words of a full queue."""

import asyncio
import json

import pytest

from regiontower.demo.guard import busy, guard, most_bytes
from regiontower.demo.limits import Limits

LIMITS = Limits(file_bytes=1000, waiting=7)
ALWAYS = {"stop": 12}
PAGE = [(b"x-gradio-user", b"app")]


def ask(path, pieces=(b"{}",), method="POST", headers=(), waiting=0):
    """`(status, body, what the application got)` for a request in pieces, when so many others wait."""
    got, said = [], []
    left = [{"type": "http.request", "body": piece, "more_body": True} for piece in pieces]
    left[-1]["more_body"] = False

    async def app(scope, receive, send):
        message = await receive()
        got.append(message["body"])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"fine"})

    async def receive():
        return left.pop(0)

    async def send(message):
        said.append(message)

    scope = {"type": "http", "method": method, "path": path, "headers": list(headers)}
    asyncio.run(guard(app, LIMITS, range(waiting), ALWAYS)(scope, receive, send))
    assert [message["type"] for message in said] == ["http.response.start", "http.response.body"]
    return said[0]["status"], said[1]["body"], got


def detail(body):
    return json.loads(body)["detail"]


def test_what_is_in_order_reaches_gradio_as_it_came():
    body = json.dumps({"data": [{"path": "x", "name": "a.png"}, "/file=x"]}).encode()
    assert ask("/gradio_api/queue/join", [body[:5], body[5:]]) == (200, b"fine", [body])
    assert ask("/login", [b"username=me&password=x"])[2] == [b"username=me&password=x"]
    assert ask("/config", method="GET")[0] == 200


def test_a_body_may_be_so_large_and_an_upload_is_gradios_to_count():
    most = most_bytes(LIMITS)
    assert ask("/gradio_api/call/models", [bytes(most)])[0] == 200
    status, body, got = ask("/gradio_api/call/models", [bytes(most), b"x", b"never read"])
    assert status == 413 and got == [] and "make it smaller" in detail(body)
    assert ask("/gradio_api/upload", [bytes(most + 1)])[2] == [bytes(most + 1)]


@pytest.mark.parametrize(
    "path",
    [
        *(
            "/gradio_api/file=/etc/passwd",
            "/gradio_api/file/etc/passwd",
            "/file=x",
            "/gradio_api/file=http://a.b/c.png",
        ),
        *("/gradio_api/proxy=https://a.b/c", "/gradio_api/file=C:\\x"),
    ],
)
def test_no_file_is_served_and_no_address_fetched(path):
    status, body, got = ask(path, method="GET")
    assert (status, detail(body), got) == (403, "The demo serves no files.", [])


def test_what_the_page_does_not_need_is_not_there():
    for path in ("/gradio_api/process_recording", "/gradio_api/vibe-edit/", "/gradio_api/component_server", "/x"):
        assert ask(path)[0] == 404 and ask(path)[2] == []
    assert ask("/gradio_api/upload", method="PUT")[0] == 200 and ask("/config", method="DELETE")[0] == 404


@pytest.mark.parametrize("path", ["/etc/passwd", "http://a.b/c.png"])
def test_a_file_of_gradios_kind_is_refused_wherever_it_stands(path):
    file = {"path": path, "meta": {"_type": "gradio.FileData"}}
    for data in (file, [file], {"data": [1, {"deep": [file]}]}):
        for text in (json.dumps(data), json.dumps(data).replace("meta", "m\\u0065ta")):
            status, body, got = ask("/gradio_api/queue/join", [text.encode()])
            assert status == 400 and got == [] and "no file" in detail(body)


def test_a_full_queue_is_told_to_the_page_and_to_programs():
    says = "The demo is busy: 7 requests are waiting already and this one was not taken; try again in a minute."
    assert busy(LIMITS) == says
    for path, headers, status in (
        ("/gradio_api/queue/join", PAGE, 429),
        ("/gradio_api/queue/join", [(b"x-gradio-user", b"api")], 503),
        ("/gradio_api/call/ask", [], 503),
        ("/gradio_api/call/v2/ask/", [], 503),
    ):
        assert ask(path, headers=headers, waiting=6)[0] == 200
        found, body, got = ask(path, headers=headers, waiting=7)
        assert (found, detail(body), got) == (status, says, [])
    assert ask("/gradio_api/run/predict", waiting=8)[0] == 200  # does not wait


def test_an_answer_can_be_stopped_when_the_queue_is_full():
    for path, body in (
        ("/gradio_api/call/stop", b'{"data": ["x"]}'),
        ("/gradio_api/queue/join", b'{"fn_index": 12, "data": ["x"]}'),
    ):
        assert ask(path, [body], waiting=8)[2] == [body]
    for body in (b'{"fn_index": 13}', b'{"fn_index": [12]}', b"[12]", b"no JSON"):
        assert ask("/gradio_api/queue/join", [body], waiting=8)[0] == 503
