"""`regiontower demo`: talk about pictures in a browser."""

import signal
import sys
from typing import Annotated

import typer

from .options import Device, Dtype

app = typer.Typer()


@app.command()
def demo(
    models: Annotated[
        list[str] | None,
        typer.Argument(help="nano (the default), run directories, checkpoint folders or hub ids; two are compared."),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to bind; 0.0.0.0 is reached from other machines.")] = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="The first free one from 7860 on by default.")
    ] = None,
    share: Annotated[bool, typer.Option("--share", help="Also make a public address, through Gradio's relay.")] = False,
    auth: Annotated[
        list[str] | None, typer.Option(metavar="NAME:PASSWORD", help="Ask users to log in; repeat for more.")
    ] = None,
    browser: Annotated[bool, typer.Option("--browser", help="Open the page in the default browser.")] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Draw a box, ask, see boxes back: a page in the browser, and an HTTP API."""
    from .demo.serve import launch, read_logins, warning

    logins = read_logins(auth or [])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # goes the way of Ctrl+C: uploads are deleted
    typer.echo("opening models ...", err=True)
    server = launch(
        models or ["nano"],
        host=host,
        port=port,
        share=share,
        auth=logins,
        open_browser=browser,
        device=device,
        dtype=dtype,
    )
    if caution := warning(host, share, logins):
        typer.echo(f"regiontower: {caution}", err=True)
    typer.echo(f"the demo is at {server.share_url or server.url} - Ctrl+C ends it", err=True)
    try:
        server.app.block_thread()
    except KeyboardInterrupt:
        pass
    finally:
        server.close()
