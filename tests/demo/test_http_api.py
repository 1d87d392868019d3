"""The HTTP API on a live server: its schema, conversations, isolation, bad uploads, and no way to a file."""

import base64
import io
import json
import threading
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from PIL import Image

pytest.importorskip("gradio_client", reason="Gradio is not installed (extra: demo)")

from gradio.route_utils import delete_files_created_by_app
from gradio_client import Client
from gradio_client.exceptions import AppError

from regiontower.train_stages.scenes import EVAL_SEED_START, SIGN, generate_scene

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def client(server):
    return Client(server.url, verbose=False, httpx_kwargs={"timeout": 120})


def as_text(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


@pytest.fixture(scope="module")
def scene():
    return generate_scene(EVAL_SEED_START + 11)


@pytest.fixture
def opened(client, scene):
    return client.predict(as_text(scene.image), "scene.png", api_name="/open_picture")


def marks_of(scene):
    return [
        {"number": i, "box_xyxy": list(region.box_xyxy), "label": ""}
        for i, region in enumerate(scene.record.regions, 1)
        if not region.stuff
    ]


def request(url: str, data: bytes | None = None, **headers: str) -> tuple[int, bytes]:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=120) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def test_the_schema_names_every_endpoint_with_its_types(server):
    _, body = request(f"{server.url}gradio_api/info")
    endpoints = json.loads(body)["named_endpoints"]
    assert set(endpoints) == {
        *("/models", "/open_picture", "/ask", "/ask_stream", "/stop", "/restart"),
        *("/similarity", "/tokens", "/page", "/close"),
    }
    parameters = {row["parameter_name"]: row for row in endpoints["/ask"]["parameters"]}
    assert list(parameters) == ["session", "question", "marks", "model", "region_prompt", "max_new_tokens"]
    assert parameters["marks"]["type"]["items"]["properties"]["box_xyxy"]["items"] == {"type": "number"}
    answer = endpoints["/ask"]["returns"][0]["type"]["properties"]
    assert set(answer) == {"model", "answer", "state", "status", "boxes", "first_token_seconds"}
    assert set(answer["boxes"]["items"]["properties"]) == {"box_xyxy", "score", "words"}


def test_a_conversation_answers_as_the_engine_does(server, client, scene, opened):
    assert (opened["width"], opened["height"], opened["note"]) == (*scene.image.size, "")
    assert [row["name"] for row in client.predict(api_name="/models")] == ["nano", "nano-clip"]
    token, marks = opened["session"], marks_of(scene)
    mine = server.engine.open_image(scene.image).token
    for question in ("What is in [1]?", "List everything with boxes."):
        answer = client.predict(token, question, marks, "nano", "", 64, api_name="/ask")
        *_, turns = server.engine.ask(mine, ["nano"], question, marks, max_new_tokens=64)
        assert answer["answer"] == turns["nano"].answer and answer["state"] == "done"
    assert answer["status"] == "boxes" and len(answer["boxes"]) >= 1
    for box in answer["boxes"]:
        x1, y1, x2, y2 = box["box_xyxy"]
        assert 0 <= x1 <= x2 <= opened["width"] and 0 <= y1 <= y2 <= opened["height"] and 0 <= box["score"] <= 1
    page = client.predict(token, api_name="/page")
    assert page.startswith("<!doctype html>") and "List everything with boxes." in page
    for name, arguments in (("/tokens", ()), ("/similarity", (marks, 1))):
        url = client.predict(token, *arguments, api_name=name)
        picture = Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/png;base64,"))))
        assert picture.size == scene.image.size


def test_a_stream_comes_in_pieces_and_can_be_stopped(client, scene, opened):
    job = client.submit(opened["session"], "List everything with boxes.", marks_of(scene), api_name="/ask_stream")
    pieces = list(job)
    assert len(pieces) > 3 and [piece["state"] for piece in pieces[:-1]] == ["answering"] * (len(pieces) - 1)
    assert pieces[-1]["state"] == "done" and pieces[-1]["boxes"]
    job = client.submit(opened["session"], "List everything with boxes.", api_name="/ask_stream")
    next(iter(job))
    client.predict(opened["session"], api_name="/stop")
    assert job.outputs()[-1]["state"] in ("answering", "stopped") and list(job)[-1:] != []
    assert job.outputs()[-1]["state"] == "stopped"


def test_without_its_token_nobody_gets_at_a_session(client, opened):
    for token in ("", "x" * 32, opened["session"][:-1]):
        for name in ("/ask", "/tokens", "/page", "/restart"):
            arguments = (token, "Hi") if name == "/ask" else (token,)
            with pytest.raises(AppError, match=r"open a picture first|no longer kept"):
                client.predict(*arguments, api_name=name)
    client.predict(opened["session"], api_name="/close")
    with pytest.raises(AppError, match="no longer kept"):
        client.predict(opened["session"], api_name="/page")


def test_mistakes_are_told_and_bugs_are_not_spelled_out(server, client, opened, monkeypatch):
    for arguments, says in (
        (("What is in [3]?",), "no mark"),
        (("Hi", [{"number": 1}]), "needs either"),
        (("Hi", [], "gpt"), "no model 'gpt'"),
        (("Hi", [], "", "drawn"), "region_prompt must be one of"),
    ):
        with pytest.raises(AppError, match=says):
            client.predict(opened["session"], *arguments, api_name="/ask")
    monkeypatch.setattr(server.engine.sessions, "get", lambda token: Path("/secret/path").read_text())
    with pytest.raises(AppError) as told:
        client.predict(opened["session"], "Hi", api_name="/ask")
    assert "secret" not in str(told.value)


@pytest.mark.parametrize(
    ("data", "name", "says"),
    [
        (b"", "a.png", "0 bytes"),
        (b"<svg><script>alert(1)</script></svg>", "a.svg", "SVG"),
        (b"\0\0\0\x18ftypheic" + bytes(50), "a.heic", "HEIC"),
        (b"just text", "a.jpg", "text file"),
        (PNG + bytes(50), "a.png", "a.png"),
    ],
)
def test_bad_pictures_get_a_sentence_and_the_server_lives_on(client, data, name, says):
    with pytest.raises(AppError, match=says):
        client.predict(base64.b64encode(data).decode(), name, api_name="/open_picture")
    with pytest.raises(AppError, match="not base64"):
        client.predict("#" + name, name, api_name="/open_picture")
    assert client.predict(api_name="/models")


def send_event(server, row: int | str, data: list, who: str) -> bytes:
    """What the server says to an event of the page, sent by a program: `row` is the event's number, or its target's."""
    if isinstance(row, str):
        config = json.loads(request(f"{server.url}config")[1])
        row = next(d["id"] for d in config["dependencies"] if d["targets"] and d["targets"][0][1] == row)
    joined = json.dumps({"data": data, "fn_index": row, "session_hash": who}).encode()
    status, body = request(f"{server.url}gradio_api/queue/join", joined, **{"Content-Type": "application/json"})
    return request(f"{server.url}gradio_api/queue/data?session_hash={who}")[1] if status == 200 else body


def test_no_file_of_the_machine_can_be_read(server, tmp_path):
    secret = tmp_path / "secret.png"
    Image.new("RGB", (60, 60), "red").save(secret)
    for path in ("/etc/passwd", "../../../etc/passwd", f"{server.files}/../x", str(secret), "http://127.0.0.1/x.png"):
        for route in ("file=", "file/"):
            status, body = request(f"{server.url}gradio_api/{route}{path}")
            assert status in (403, 404) and b"root:" not in body and PNG not in body
    # The page's own event with a file that was never uploaded, plain and as Gradio writes files.
    before = len(server.engine.sessions)
    for path in ("/etc/passwd", str(secret), f"{server.files}/../../etc/passwd", "http://127.0.0.1/x.png"):
        plain = {"path": path, "name": "a.png", "size": 9}
        assert b"a.png did not arrive" in send_event(server, "upload", [plain, ""], "intruder")
        body = send_event(server, "upload", [{**plain, "meta": {"_type": "gradio.FileData"}}, ""], "intruder")
        assert b"takes no file" in body
    assert len(server.engine.sessions) == before
    assert request(f"{server.url}gradio_api/info")[0] == 200


def upload(server, name: str, data: bytes) -> tuple[int, bytes]:
    border = "xyz"
    body = (
        f'--{border}\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n'
        "Content-Type: image/png\r\n\r\n"
    ).encode()
    kind = {"Content-Type": f"multipart/form-data; boundary={border}"}
    return request(f"{server.url}gradio_api/upload", body + data + f"\r\n--{border}--\r\n".encode(), **kind)


def test_an_uploads_name_cannot_leave_the_upload_folder(server):
    status, answer = upload(server, "../../../escaped.png", b"hello")
    assert status == 200
    (path,) = json.loads(answer)
    assert path.startswith(str(server.files)) and ".." not in path and Path(path).is_file()
    delete_files_created_by_app(server.app, -1)  # what runs every minute, as if all files were old
    assert server.app.delete_cache[1] <= 300
    assert not Path(path).exists()
    assert upload(server, "a.png", bytes(server.engine.limits.file_bytes + 1))[0] == 413


def test_an_upload_is_not_served_to_anybody(server):
    """Not even to who knows its path: a drawing or a page with a script would come from the demo's own address."""
    for name, data in (("a.svg", b"<svg><script>alert(1)</script></svg>"), ("a.png", PNG)):
        status, answer = upload(server, name, data)
        (path,) = json.loads(answer)
        assert status == 200 and Path(path).read_bytes() == data
        status, body = request(f"{server.url}gradio_api/file={path}")
        assert status == 403 and data not in body


def test_the_pages_events_take_no_token_from_their_sender(server, opened):
    """A page is known by what the server keeps of it. A program that sends events with a token of its choice gets at no
    session; the HTTP API is there for programs, and asks for the token."""
    config = json.loads(request(f"{server.url}config")[1])
    state = next(c["id"] for c in config["components"] if c["type"] == "state")
    events = [d for d in config["dependencies"] if d["inputs"] == [state] and d["outputs"]]
    assert len(events) >= 2  # a new conversation, the saved page
    for event in events:
        body = send_event(server, event["id"], [opened["session"]], "stranger")
        assert b"open a picture first" in body


def test_concurrent_sessions_hear_of_their_own_picture_only(server, client):
    """Six programs at once, each with the word of its own picture; answers equal those given alone."""
    scenes = [generate_scene(EVAL_SEED_START + 100 + i) for i in range(6)]

    def talk(scene) -> list[str]:
        own = Client(server.url, verbose=False, httpx_kwargs={"timeout": 120})
        token = own.predict(as_text(scene.image), "a.png", api_name="/open_picture")["session"]
        sign = next(r for r in scene.record.regions if r.category == SIGN)
        marks = [{"number": 1, "box_xyxy": list(sign.box_xyxy), "label": ""}]
        return [own.predict(token, q, marks, api_name="/ask")["answer"] for q in ("Read [1].", "What is in [1]?")]

    def alone(scene) -> list[str]:
        token = server.engine.open_image(scene.image).token
        sign = next(r for r in scene.record.regions if r.category == SIGN)
        marks = [{"number": 1, "box_xyxy": list(sign.box_xyxy), "label": ""}]
        answers = []
        for question in ("Read [1].", "What is in [1]?"):
            *_, turns = server.engine.ask(token, ["nano"], question, marks)
            answers.append(turns["nano"].answer)
        return answers

    expected = [alone(scene) for scene in scenes]
    assert len({tuple(row) for row in expected}) == len(expected)
    found: dict[int, list[str]] = {}
    threads = [threading.Thread(target=lambda i=i: found.update({i: talk(scenes[i])})) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found.get(i) for i in range(6)] == expected


def test_only_this_machine_is_listened_to_and_nothing_is_shared(server):
    assert server.url.startswith("http://127.0.0.1:") and server.share_url is None
    assert server.app.server_name == "127.0.0.1" and not server.app.share and server.app.auth is None
