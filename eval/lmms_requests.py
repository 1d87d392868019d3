"""What lmms-eval asks, in our terms."""

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from ..vision_towers.errors import UserError

# What a task may say about generation: answers are greedy, so the rest of these must not ask for anything else.
_GREEDY = {"do_sample": (False, None), "num_beams": (1, None), "n": (1, None)}
DEFAULT_NEW_TOKENS = 48

Turn = Callable[[], tuple[Image.Image, str]]


@dataclass(frozen=True)
class Asked:
    """One request of lmms-eval: the key of its reply, and where to get its picture again.

    picture: hash of the pixels. turn: picture and text of the question, read anew. answer: the one to be scored; None
    where the model is to write one.
    """

    key: str
    picture: str
    text: str
    boxes: list[list[float]]
    turn: Turn
    task: str
    doc_id: int
    max_new_tokens: int = 0
    until: tuple[str, ...] = ()
    grounding: bool = False
    answer: str | None = None


class Pictures:
    """Decoded pictures by hash, as many as fit; the others are read again.

    Reading every request once, for its key, decodes every picture; a benchmark's pictures can take more memory than
    there is.

    Args:
        budget: bytes of pixels to hold.
    """

    def __init__(self, budget: int = 2**30) -> None:
        self._budget, self._held, self._bytes, self._lock = budget, OrderedDict[str, Image.Image](), 0, threading.Lock()

    def put(self, picture: Image.Image) -> str:
        """Its hash; it is held when there is room."""
        pixels = picture.tobytes()
        key = hashlib.sha256(f"{picture.size}".encode() + pixels).hexdigest()
        with self._lock:
            if key not in self._held and self._bytes + len(pixels) <= self._budget:
                self._held[key] = picture
                self._bytes += len(pixels)
        return key

    def get(self, asked: Asked) -> Image.Image:
        """The picture of a request."""
        with self._lock:
            held = self._held.get(asked.picture)
        return asked.turn()[0] if held is None else held


def one_turn(messages: Sequence[Mapping], task: str) -> tuple[Image.Image, str]:
    """Picture and text of chat messages: one user turn with one image."""
    parts = [part for message in messages for part in message["content"]]
    images = [part["url"] for part in parts if part["type"] == "image"]
    others = {part["type"] for part in parts} - {"image", "text"}
    if len(messages) != 1 or len(images) != 1 or others:
        raise UserError(f"task {task} is not one user turn with one image, which is all that regiontower answers")
    return upright(images[0]), "\n".join(part["text"] for part in parts if part["type"] == "text")


def one_visual(visuals: Any, task: str) -> Image.Image:
    """The one image of a simple request."""
    images = list(visuals or [])
    if len(images) != 1 or isinstance(images[0], Mapping) or not isinstance(images[0], Image.Image | str):
        raise UserError(f"task {task} does not have one image a question, which is all that regiontower answers")
    return upright(images[0])


def upright(image: Any) -> Image.Image:
    """RGB, from PIL or a path."""
    if not isinstance(image, Image.Image):
        from ..train_stages.images import open_image

        image = open_image(image)
    return image.convert("RGB")


def generation_of(generation: Mapping, task: str, max_new_tokens: int | None) -> tuple[int, tuple[str, ...]]:
    """The longest answer in tokens, and the strings that end one.

    Args:
        max_new_tokens: overrides what the task says.
    Raises:
        UserError: the task wants anything but greedy answers.
    """
    for name, allowed in _GREEDY.items():
        if generation.get(name) not in allowed:
            raise UserError(f"task {task} asks for {name}={generation[name]}, but regiontower's answers are greedy")
    until = generation.get("until") or ()
    tokens = max_new_tokens or whole_number("max_new_tokens", generation.get("max_new_tokens", DEFAULT_NEW_TOKENS))
    return tokens, (until,) if isinstance(until, str) else tuple(until)


def whole_number(name: str, value: Any) -> int:
    """A number of at least 1, however it is written."""
    try:
        number = int(str(value))
    except ValueError:
        number = 0
    if number < 1:
        raise UserError(f"{name} is {value!r}; give a whole number of at least 1")
    return number


def cut_at(text: str, until: Sequence[str]) -> str:
    """The text before the first stop string."""
    for stop in until:
        text = text.split(stop)[0] if stop else text
    return text
