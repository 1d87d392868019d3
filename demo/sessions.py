"""Who is talking about which picture: sessions that cannot see each other."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from PIL import Image

from ..vision_towers import UserError
from .conversation import Conversation
from .limits import Limits
from .models import DemoModel

GONE = "this picture is no longer kept (it was not used for a while, or the server was started again); open it again."


@dataclass
class Session:
    """One user's picture and its conversations, one a model. Known only to whoever holds the token.

    Attributes:
        picture: tells its picture from others, and is no secret.
        stop: set to end the answers that are being written.
    """

    token: str
    image: Image.Image
    conversations: dict[str, Conversation]
    picture: str = field(default_factory=lambda: secrets.token_hex(8))
    stop: threading.Event = field(default_factory=threading.Event)
    used: float = field(default_factory=time.monotonic)
    _busy: threading.Lock = field(default_factory=threading.Lock)

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Hold the session while it answers: one question at a time, and nothing is taken away under it.

        Raises:
            UserError: it is answering already.
        """
        if not self._busy.acquire(blocking=False):
            raise UserError("the last question is still being answered; wait for it or stop it.")
        try:
            self.stop.clear()
            yield
        finally:
            self.used = time.monotonic()
            self._busy.release()

    @property
    def busy(self) -> bool:
        return self._busy.locked()


class Sessions:
    """All sessions of a server; tokens cannot be guessed, and without one there is no way to a session."""

    def __init__(self, models: Sequence[DemoModel], limits: Limits):
        self.models: Mapping[str, DemoModel] = {model.name: model for model in models}
        self.limits = limits
        self._sessions: dict[str, Session] = {}
        self._lock = threading.Lock()

    def open(self, image: Image.Image) -> Session:
        """A new session about a picture.

        Raises:
            UserError: as many sessions as there may be are answering right now.
        """
        conversations = {name: Conversation(model, image, self.limits) for name, model in self.models.items()}
        session = Session(secrets.token_urlsafe(24), image, conversations)
        with self._lock:
            self._make_room()
            self._sessions[session.token] = session
        return session

    def get(self, token: str | None) -> Session:
        """The session of a token.

        Raises:
            UserError: there is none.
        """
        with self._lock:
            session = self._sessions.get(token or "")
            if session is None:
                raise UserError(GONE if token else "open a picture first.")
            session.used = time.monotonic()
            return session

    def close(self, token: str | None) -> None:
        """Forget a session, and end what it is saying; unknown tokens are nothing to close."""
        with self._lock:
            session = self._sessions.pop(token or "", None)
        if session is not None:
            session.stop.set()

    def model(self, name: str) -> DemoModel:
        """A model by its name in the menu.

        Raises:
            UserError: no such model.
        """
        if name not in self.models:
            raise UserError(f"there is no model {name!r} here; choose among {', '.join(self.models)}.")
        return self.models[name]

    def __contains__(self, token: str | None) -> bool:
        with self._lock:
            return (token or "") in self._sessions

    def __len__(self) -> int:
        return len(self._sessions)

    def _make_room(self) -> None:
        """Forget idle sessions, and the one unused for longest when there are too many."""
        now = time.monotonic()
        free = sorted((s for s in self._sessions.values() if not s.busy), key=lambda session: session.used)
        for session in free:
            idle = now - session.used > self.limits.idle_seconds
            if idle or len(self._sessions) >= self.limits.sessions:
                del self._sessions[session.token]
        if len(self._sessions) >= self.limits.sessions:
            raise UserError("the server is busy with as many pictures as it can keep; try again in a minute.")
