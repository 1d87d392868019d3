"""What stands between the network and Gradio: no file is served or fetched, requests that are too large are refused,
and a full queue is told in a sentence."""

from __future__ import annotations

import json
import re
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from .limits import Limits

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

# Gradio would serve uploads to whoever knows their path, and fetch any address and hand on what it finds as its own.
_FILES = re.compile(r"/(?:file|proxy)[=/]")
_UPLOADS = re.compile(r"/upload/?$")  # as large as a file may be: Gradio counts while they come
_QUEUED = re.compile(r"/(?:queue/join|call/.*)$")


def guard(app: App, limits: Limits) -> App:
    """An ASGI application that stands before `app`, Gradio's."""
    most = most_bytes(limits)

    async def guarded(scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await app(scope, receive, send)
        path = scope["path"]
        if _FILES.search(path):
            return await _answer(send, 403, "The demo serves no files.")
        if scope["method"] == "POST" and not _UPLOADS.search(path):
            body = await _body(receive, most)
            if body is None:
                return await _answer(send, 413, f"The request has more than {most / 2**20:.0f} MB; make it smaller.")
            if names_a_file(body):
                return await _answer(send, 400, "The demo takes no file by its path or address.")
            receive = _again(body, receive)
            if _QUEUED.search(path):
                send = _tell_full(scope, send, busy(limits))
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


def names_a_file(body: bytes) -> bool:
    """Whether a request holds a file of Gradio's kind, which it would look for or download; this page sends none."""
    try:
        left = [json.loads(body)]
    except (ValueError, RecursionError):
        return False  # Gradio cannot read it either
    while left:
        value = left.pop()
        if isinstance(value, dict):
            if "path" in value and "meta" in value:
                return True
            left += value.values()
        elif isinstance(value, list):
            left += value
    return False


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


def _tell_full(scope: Message, send: Send, sentence: str) -> Send:
    """`send` with another text in the answer that says the queue is full.

    Gradio's page shows a text of its own for status 503 and ours for any other, its Python client knows only 503.
    """
    from_page = (b"x-gradio-user", b"app") in scope["headers"]
    held: list[Message] = []

    async def told(message: Message) -> None:
        if message["type"] == "http.response.start" and message["status"] == 503:
            held.append(message)
        elif not held:
            await send(message)
        elif b"full" in message.get("body", b""):
            await _answer(send, 429 if from_page else 503, sentence)
        else:  # the server is being stopped
            await send(held[0])
            await send(message)

    return told


async def _answer(send: Send, status: int, sentence: str) -> None:
    body = json.dumps({"detail": sentence}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
