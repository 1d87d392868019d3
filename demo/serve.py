"""Start the demo: models opened, page built, server bound to this machine alone unless the user says otherwise."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..vision_towers import UserError
from .engine import Engine
from .limits import Limits
from .models import load_models

LOCAL = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class Server:
    """A running demo.

    Attributes:
        app: the Gradio app. url: where it answers. share_url: its public address, with `share`.
        files: the folder of uploads, this server's own.
    """

    app: Any
    engine: Engine
    url: str
    share_url: str | None
    files: Path

    def close(self) -> None:
        """Stop answering, and delete the uploads."""
        self.app.close()
        shutil.rmtree(self.files, ignore_errors=True)


def launch(
    sources: Sequence[str | Path] = ("nano",),
    *,
    host: str = "127.0.0.1",
    port: int | None = None,
    share: bool = False,
    auth: Sequence[tuple[str, str]] = (),
    open_browser: bool = False,
    device: str = "auto",
    dtype: str = "auto",
    limits: Limits | None = None,
) -> Server:
    """Open the models and serve the page; returns at once.

    Args:
        sources: packaged names, run directories, checkpoint folders or hub ids.
        host: address to bind; 127.0.0.1 is reached from this machine alone.
        port: None = the first free one from 7860 on.
        share: also make a public address, through Gradio's relay.
        auth: (name, password) pairs; none = nobody has to log in.
        open_browser: show the page in the default browser.
    Raises:
        UserError: a model that cannot be opened, a port that is taken, or Gradio not installed.
    """
    # Before Gradio is imported: it reads these once, and would write into a folder that all users of a machine share.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    files = Path(tempfile.mkdtemp(prefix="regiontower-demo-"))
    os.environ["GRADIO_TEMP_DIR"] = str(files)
    with ExitStack() as undo:  # whatever goes wrong, Ctrl+C while models are opened too
        undo.callback(shutil.rmtree, files, ignore_errors=True)
        try:
            import gradio as gr
        except ImportError as error:
            raise UserError('the demo needs Gradio: pip install "regiontower[demo]".') from error
        from starlette.middleware import Middleware

        from .api import ALWAYS
        from .app import CSS, build_app
        from .guard import guard

        limits = limits or Limits()
        engine = Engine(load_models(sources, device=device, dtype=dtype), limits)
        app = build_app(engine, files)
        always = {str(event.api_name): event._id for event in app.fns.values() if event.api_name in ALWAYS}
        before = Middleware(guard, limits=limits, queue=app._queue, always=always)
        try:
            _, url, share_url = app.launch(
                server_name=host,
                server_port=port,
                share=share,
                auth=list(auth) or None,
                inbrowser=open_browser,
                prevent_thread_lock=True,
                quiet=True,
                show_error=False,  # a bug's message may hold paths; users' mistakes are shown all the same
                run_history=False,
                enable_monitoring=False,
                footer_links=["api", "settings"],
                allowed_paths=[],
                max_file_size=limits.file_bytes,
                app_kwargs={"middleware": [before]},
                ssr_mode=False,
                mcp_server=False,
                pwa=False,
                _frontend=False,  # nothing but a self-test, which gives a slow machine three seconds to answer
                css=CSS,
                # No font that a browser would have to fetch from elsewhere, and no colour that boxes have.
                theme=gr.themes.Default(  # pyright: ignore[reportPrivateImportUsage]
                    primary_hue="indigo", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
                ),
            )
        except OSError as error:
            raise UserError(f"the demo cannot listen on {host}, port {port or '7860 and up'}: {error}.") from error
        undo.pop_all()
        return Server(app, engine, url, share_url, files)


def warning(host: str, share: bool, auth: Sequence[tuple[str, str]]) -> str:
    """What a user who opens the demo to others should know; "" for one who does not."""
    if auth or not (share or host not in LOCAL):
        return ""
    return "everybody who finds this address can use the demo; --auth NAME:PASSWORD asks them to log in."


def read_logins(texts: Sequence[str]) -> list[tuple[str, str]]:
    """ "name:password" -> pairs.

    Raises:
        UserError: no colon, or an empty half.
    """
    parts = [text.partition(":") for text in texts]
    logins = [(name, password) for name, _, password in parts]
    if not all(name and password for name, password in logins):
        raise UserError("--auth takes NAME:PASSWORD, neither of them empty.")
    return logins
