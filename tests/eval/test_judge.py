"""The judge of Ferret-Bench, played by a local HTTP server that speaks the real protocol."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from regiontower.eval.judge import Judge, judge_prompt, judge_samples, parse_marks, readable
from regiontower.eval.scoring import summarise
from regiontower.eval.task_rows import TaskRow
from regiontower.vision_towers.errors import UserError


@pytest.fixture
def endpoint():
    """`(url, asked, replies)`: what was asked, and the replies to come: a text, or an HTTP status."""
    asked, replies = [], []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append((self.path, self.headers.get("Authorization"), body))
            reply = replies.pop(0)
            status, text = (reply, "") if isinstance(reply, int) else (200, reply)
            data = json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1", asked, replies
    server.shutdown()
    server.server_close()
    thread.join()


def row(category="refer_desc"):
    told = {"context": "Objects: a sign", "question": "What is in [0.1, 0.2, 0.3, 0.4]?", "rule": "Rate both."}
    context = json.dumps(told | {"role": "Assistant", "category": category})
    known = {"phrase": "", "question": "What is in <region>?", "prompt_boxes": [[1, 2, 3, 4]], "target_xyxy": []}
    return TaskRow("a.png", 10, 10, "a", -1, answers=["A stop sign."], context=context, **known)


def samples(*answers):
    return [{"answer": answer, "image_id": str(i)} for i, answer in enumerate(answers)]


@pytest.mark.parametrize(
    ("text", "marks"),
    [
        ("8 6\nThe first is better.", (8, 6)),
        ("8, 6", (8, 6)),
        ("7.5 10", (7.5, 10)),
        ("\n9 9\n", (9, 9)),
        ("Assistant 1: 8", None),
        ("8", None),
        ("8 6 7", None),
        ("11 6", None),
        ("0 6", None),
        ("", None),
    ],
)
def test_marks(text, marks):
    assert parse_marks(text) == marks


def test_the_protocol_and_the_score(endpoint, tmp_path, monkeypatch):
    url, asked, replies = endpoint
    monkeypatch.setenv("REGIONTOWER_JUDGE_KEY", "secret")
    replies += ["8 6\nwell", "10 3"]
    found = samples("a sign", "a tree")
    judge_samples(Judge(url, "gpt-judge"), found, [row(), row()], tmp_path)
    path, key, body = asked[0]
    assert path == "/v1/chat/completions" and key == "Bearer secret"
    assert body["model"] == "gpt-judge" and body["temperature"] == 0
    assert [message["role"] for message in body["messages"]] == ["system", "user"]
    text = body["messages"][1]["content"]
    assert text == judge_prompt(row(), "a sign")
    order = [text.index(part) for part in ("Objects: a sign", "[0.1, 0.2", "A stop sign.", "a sign\n", "Rate both.")]
    assert order[2] < order[4] and "[Assistant 1]\nA stop sign." in text and "[Assistant 2]\na sign" in text
    assert [(s["score"], s["reference_score"], s["judged"]) for s in found] == [(6, 8, True), (3, 10, True)]
    figures = summarise("judged", found)
    assert figures["relative_score"] == pytest.approx(9 / 18) and figures["judged"] == 1.0
    # Nothing is paid for twice.
    again = samples("a sign", "a tree")
    judge_samples(Judge(url, "gpt-judge"), again, [row(), row()], tmp_path)
    assert again == found and len(asked) == 2
    assert "secret" not in (tmp_path / "judgements.jsonl").read_text()


def test_off_by_default(tmp_path):
    found = samples("a sign")
    judge_samples(None, found, [row()], tmp_path)
    figures = summarise("judged", found)
    assert figures["n"] == 1 and figures["relative_score"] is None and figures["judged"] == 0.0
    assert not list(tmp_path.iterdir())


def test_a_judgement_without_marks_is_asked_once_more_and_then_left_out(endpoint, tmp_path):
    url, asked, replies = endpoint
    replies += ["I like both.", "7 7", "no", "never", "5 5"]
    found = samples("one", "two", "three")
    judge_samples(Judge(url, "m"), found, [row()] * 3, tmp_path)
    assert [s["judged"] for s in found] == [True, False, True] and len(asked) == 5
    assert summarise("judged", found)["relative_score"] == pytest.approx(1.0)  # over what was marked


def test_what_fails_for_a_while_is_tried_again(endpoint, tmp_path):
    url, asked, replies = endpoint
    replies += [429, 503, "4 2"]
    found = samples("one")
    judge_samples(Judge(url, "m", pauses=(0.0, 0.0)), found, [row()], tmp_path)
    assert found[0]["score"] == 2 and len(asked) == 3


def test_a_judge_that_refuses_ends_in_one_sentence_and_loses_nothing(endpoint, tmp_path):
    url, asked, replies = endpoint
    replies += ["4 2", 401]
    with pytest.raises(UserError, match=r"HTTP 401.*the answers are kept") as error:
        judge_samples(Judge(url, "m", pauses=(0.0,)), samples("one", "two"), [row()] * 2, tmp_path)
    assert "\n" not in str(error.value) and len(asked) == 2  # a wrong key is not tried again
    replies += ["5 5"]
    found = samples("one", "two")
    judge_samples(Judge(url, "m"), found, [row()] * 2, tmp_path)
    assert [s["score"] for s in found] == [2, 5] and len(asked) == 3
    with pytest.raises(UserError, match="give it as http://"):
        Judge("file:///etc", "m").ask("x")


def test_boxes_are_shown_to_the_judge_as_ferret_shows_them():
    answer = "The man [250, 100, 500, 750] holds a cup [0, 0, 10, 20]."
    assert (
        readable(answer, row("ground_conv"))
        == "The man [0.250, 0.100, 0.500, 0.750] holds a cup [0.000, 0.000, 0.010, 0.020]."
    )
    assert readable(answer, row("refer_desc")) == "The man holds a cup."
