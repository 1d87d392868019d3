"""What the page's picker may send, from anybody: pictures of the upload folder and examples, and nothing else."""

import pytest
from PIL import Image

pytest.importorskip("gradio", reason="Gradio is not installed (extra: demo)")

from regiontower.demo.answer_html import EMPTY
from regiontower.demo.examples import Example
from regiontower.demo.handlers import OPENED_PARTS, Handlers
from regiontower.demo.marks import Mark
from regiontower.demo.stage import NOTHING_DRAWN


@pytest.fixture
def handlers(engine, tmp_path, noise_image):
    (tmp_path / "uploads").mkdir()
    examples = [Example("one", noise_image(50, 40), (Mark(1, (1, 2, 30, 30)),), ("What is in [1]?",))]
    return Handlers(engine, examples, tmp_path / "uploads")


def picture(path, size=40):
    Image.new("RGB", (size, size), "red").save(path)
    return {"path": str(path), "name": path.name, "size": path.stat().st_size}


def opened(updates):
    """The token, and the message."""
    assert len(updates) == OPENED_PARTS
    return (updates[0] if isinstance(updates[0], str) else None), updates[-1]


def test_an_upload_and_an_example_open_and_close_what_was_before(handlers, engine, tmp_path):
    first, _ = opened(handlers.open(picture(tmp_path / "uploads" / "a.png"), ""))
    assert engine.sessions.get(first).image.size == (40, 40)
    second, _ = opened(handlers.open({"example": 0}, first))
    assert engine.sessions.get(second).image.size == (50, 40) and first not in engine.sessions


def test_no_file_outside_the_upload_folder_is_opened(handlers, engine, tmp_path):
    outside = picture(tmp_path / "secret.png")
    (tmp_path / "uploads" / "link.png").symlink_to(tmp_path / "secret.png")
    (tmp_path / "uploads2").mkdir()
    beside = picture(tmp_path / "uploads2" / "a.png")
    inside = str(tmp_path / "uploads")
    for path in (
        *(outside["path"], beside["path"], f"{inside}/../secret.png", f"{inside}/link.png"),
        *(inside, f"{inside}/nothing.png", "http://127.0.0.1/a.png", "a\0b", "", None, 3, ["x"], {"path": "x"}),
    ):
        token, says = opened(handlers.open({"path": path, "name": "a.png", "size": 9}, ""))
        assert token is None and "a.png did not arrive; choose it again." in says
    assert len(engine.sessions) == 0


@pytest.mark.parametrize(
    "choice", [None, "x", 3, [], {"example": 1}, {"example": -1}, {"example": "0"}, {"example": True}]
)
def test_other_choices_are_refused_in_a_sentence(handlers, engine, choice):
    token, says = opened(handlers.open(choice, ""))
    assert token is None and len(engine.sessions) == 0
    assert "there is no such example" in says or "choose a picture first" in says or "did not arrive" in says


def test_a_file_that_was_not_sent_for_its_size_is_told_why(handlers):
    for size, says in ((0, "a.png is empty (0 bytes)"), (21 * 2**20, "a.png has 21.0 MB; the limit is 20 MB")):
        token, told = opened(handlers.open({"path": "", "name": "a.png", "size": size}, ""))
        assert token is None and says in told


def test_what_waited_for_its_turn_is_not_asked_about_another_picture(handlers, engine):
    first, _ = opened(handlers.open({"example": 0}, ""))
    drawn = NOTHING_DRAWN | {
        "picture": engine.sessions.get(first).picture,
        "marks": [{"number": 1, "point_xy": [3, 3]}],
    }
    second, _ = opened(handlers.open({"example": 0}, first))
    *_, (*_, told) = handlers.ask(second, "What is at [1]?", drawn, "one", "", "own", 4)
    assert "another picture was opened" in told
    assert handlers.similarity(second, drawn, "one", "")[1] == told
    assert engine.sessions.get(second).conversations["one"].turns == []
    drawn["picture"] = engine.sessions.get(second).picture
    *_, (*_, told) = handlers.ask(second, "What is at [1]?", drawn, "one", "", "own", 4)
    assert told == "" and len(engine.sessions.get(second).conversations["one"].turns) == 1


def test_an_answer_about_a_picture_that_is_gone_shows_nothing(handlers, engine):
    first, _ = opened(handlers.open({"example": 0}, ""))
    drawn = NOTHING_DRAWN | {"picture": engine.sessions.get(first).picture}
    steps = handlers.ask(first, "Hi", drawn, "one", "", "own", 16)
    next(steps)
    next(steps)
    handlers.open({"example": 0}, first)
    *_, last = steps
    assert last[0] == EMPTY and last[2]["outlines"] == {}
