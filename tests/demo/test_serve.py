"""The command's options: logins, warnings, and what a server that asks for a login answers."""

import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from typer.testing import CliRunner

from regiontower.demo.serve import read_logins, warning
from regiontower.vision_towers import UserError


def test_logins_are_pairs():
    assert read_logins(["me:secret:with:colons", "you:x"]) == [("me", "secret:with:colons"), ("you", "x")]
    for bad in ("me", "me:", ":x"):
        with pytest.raises(UserError, match="NAME:PASSWORD"):
            read_logins([bad])


def test_only_who_opens_the_demo_to_others_is_warned():
    assert warning("127.0.0.1", False, []) == ""
    assert warning("0.0.0.0", False, [("me", "x")]) == ""
    assert "everybody" in warning("0.0.0.0", False, []) and "everybody" in warning("127.0.0.1", True, [])


def test_the_command_hands_its_options_on(monkeypatch):
    from regiontower import cli
    from regiontower.demo import serve

    given: dict = {}

    class Running:
        url, share_url = "http://127.0.0.1:1/", None

        class app:
            block_thread = staticmethod(lambda: None)

        close = staticmethod(lambda: given.update(closed=True))

    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.setattr(serve, "launch", lambda sources, **options: given.update(options, sources=sources) or Running)
    assert CliRunner().invoke(cli.app, ["demo"]).exit_code == 0
    assert given["sources"] == ["nano"] and given["host"] == "127.0.0.1" and not given["share"] and not given["auth"]
    result = CliRunner().invoke(cli.app, ["demo", "a", "b", "--auth", "me:x", "--host", "0.0.0.0", "--share"])
    assert result.exit_code == 0 and given["sources"] == ["a", "b"] and given["auth"] == [("me", "x")]
    assert given["host"] == "0.0.0.0" and given["share"] and given["closed"]


def test_importing_the_demo_imports_no_gradio_and_writes_nothing():
    code = (
        "import sys, regiontower.demo.serve, regiontower.demo.engine\n"
        "assert 'gradio' not in sys.modules\n"
        "from pathlib import Path\n"
        "import regiontower.demo.app\n"
        "assert not list(Path(regiontower.demo.app.__file__).parent.glob('*.pyi'))\n"
    )
    pytest.importorskip("gradio", reason="Gradio is not installed (extra: demo)")
    subprocess.run([sys.executable, "-c", code], check=True, timeout=280)


def test_with_a_login_nothing_is_answered_without_it(tiny_mllm_dir):
    pytest.importorskip("gradio", reason="Gradio is not installed (extra: demo)")
    from regiontower.demo.serve import launch

    server = launch([tiny_mllm_dir], auth=[("me", "secret")], device="cpu")
    try:
        for path in ("config", "gradio_api/info"):
            with pytest.raises(urllib.error.HTTPError) as told:
                urllib.request.urlopen(server.url + path, timeout=120)
            assert told.value.code == 401
        for path in ("gradio_api/call/models", "gradio_api/queue/join", "gradio_api/upload"):
            data = urllib.request.Request(server.url + path, b'{"data": []}', {"Content-Type": "application/json"})
            with pytest.raises(urllib.error.HTTPError) as told:
                urllib.request.urlopen(data, timeout=120)
            assert told.value.code == 401
        login = urllib.request.Request(server.url + "login", b"username=me&password=secret")
        with urllib.request.urlopen(login, timeout=120) as answer:
            cookie = answer.headers["set-cookie"].split(";")[0]
        config = urllib.request.Request(server.url + "config", headers={"Cookie": cookie})
        with urllib.request.urlopen(config, timeout=120) as answer:
            page = json.load(answer)
        # A page never holds a path of the machine's models.
        assert str(tiny_mllm_dir) not in json.dumps(page) and tiny_mllm_dir.name in json.dumps(page)
    finally:
        server.close()
    assert not server.files.exists()


def test_a_model_that_is_not_there_is_said_before_anything_is_served(tmp_path, monkeypatch):
    pytest.importorskip("gradio", reason="Gradio is not installed (extra: demo)")
    from regiontower.demo.serve import launch

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(UserError, match="no model can be opened"):
        launch(["/nowhere/at/all"])
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_is_told_to_stop_leaves_no_upload_behind(tiny_mllm_dir, tmp_path):
    pytest.importorskip("gradio", reason="Gradio is not installed (extra: demo)")
    command = [sys.executable, "-m", "regiontower", "demo", str(tiny_mllm_dir), "--device", "cpu"]
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        line = next(line for line in server.stderr if "the demo is at" in line)
        url = line.split()[4]
        body = '--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\nhello\r\n--x--\r\n'
        kind = {"Content-Type": "multipart/form-data; boundary=x"}
        upload = urllib.request.Request(f"{url}gradio_api/upload", body.encode(), kind)
        with urllib.request.urlopen(upload, timeout=120) as answer:
            (path,) = json.load(answer)
        assert Path(path).read_text() == "hello" and Path(path).is_relative_to(tmp_path)
        server.terminate()
        assert server.wait(timeout=120) == 143
    finally:
        server.kill()
        server.communicate()
    assert list(tmp_path.glob("regiontower-demo-*")) == []
