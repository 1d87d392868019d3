"""What stands between the network and Gradio: no file is served or fetched, requests that are too large are refused,
and a full queue is told in a sentence."""

from __future__ import annotations

import json
import re
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sized
from typing import Any

from .limits import Limits

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

# Gradio would serve uploads to whoever knows their path, and fetch any address and hand on what it finds as its own.
_FILES = re.compile(r"/(?:file|proxy)[=/]")
_UPLOADS = re.compile(r"/upload/?$")  # as large as a file may be: Gradio counts while they come
# What the page and the API post. Gradio would take more: recordings of a screen, edits of the page by a language model.
_POSTS = re.compile(r"^/(?:login|gradio_api/(?:upload|queue/join|call/.+|run/.+|cancel|reset))/?$")
_QUEUED = re.compile(r"/(?:queue/join|call/(?:v2/)?(?P<name>\w+))/?$")


def guard(app: App, limits: Limits, queue: Sized, always: Mapping[str, int]) -> App:
    """An ASGI application that stands before `app`, Gradio's.

    Args:
        queue: the requests that wait.
        always: names and numbers of the events that are taken even when it is full.
    """
    most = most_bytes(limits)

    async def guarded(scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await app(scope, receive, send)
        path = scope["path"]
        if _FILES.search(path):
            return await _answer(send, 403, "The demo serves no files.")
        if scope["method"] not in ("GET", "HEAD", "OPTIONS") and not _POSTS.match(path):
            return await _answer(send, 404, "The demo has nothing at this address.")
        if scope["method"] == "POST" and not _UPLOADS.search(path):
            body = await _body(receive, most)
            if body is None:
                return await _answer(send, 413, f"The request has more than {most / 2**20:.0f} MB; make it smaller.")
            asked = _parsed(body)
            if names_a_file(asked):
                return await _answer(send, 400, "The demo takes no file by its path or address.")
            if (queued := _QUEUED.search(path)) and len(queue) >= limits.waiting:
                number = asked.get("fn_index") if isinstance(asked, dict) else None
                if queued["name"] not in always and number not in always.values():
                    return await _answer(send, _full_status(scope), busy(limits))
            receive = _again(body, receive)
        await app(scope, receive, send)

    return guarded


def most_bytes(limits: Limits) -> int:
    """Of a request that is no upload. A picture comes as base64, a third more; one that is somewhat too large shall
    hear so from `read_picture`."""
    return 3 * limits.file_bytes + 2**20


def busy(limits: Limits) -> str:
    """What is said when the queue is full."""
    return (
        f"The demo is busy: {limits.waiting} requests are waiting already and this one was not taken; "
        "try again in a minute."
    )


def names_a_file(asked: Any) -> bool:
    """Whether a request holds a file of Gradio's kind, which it would look for or download; this page sends none."""
    left = [asked]
    while left:
        value = left.pop()
        if isinstance(value, dict):
            if "path" in value and "meta" in value:
                return True
            left += value.values()
        elif isinstance(value, list):
            left += value
    return False


def _parsed(body: bytes) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None  # Gradio cannot read it either


def _full_status(scope: Message) -> int:
    """Gradio's page shows a text of its own for 503 and ours for any other; its Python client knows 503 alone."""
    return 429 if (b"x-gradio-user", b"app") in scope["headers"] else 503


async def _body(receive: Receive, most: int) -> bytes | None:
    """The whole body; None when it is larger than `most`."""
    body = bytearray()
    while True:
        message = await receive()
        body += message.get("body", b"")
        if len(body) > most:
            return None
        if not message.get("more_body", False):
            return bytes(body)


def _again(body: bytes, receive: Receive) -> Receive:
    """`receive` for an application that has not seen the body yet."""
    left = [body]

    async def first_the_body() -> Message:
        if left:
            return {"type": "http.request", "body": left.pop(), "more_body": False}
        return await receive()

    return first_the_body


async def _answer(send: Send, status: int, sentence: str) -> None:
    body = json.dumps({"detail": sentence}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
