"""The page in headless Chromium: drawing, asking, boxes at the right pixels."""

import sys
import threading
from pathlib import Path
from types import SimpleNamespace

from regiontower.mllm import ChatSession
from regiontower.train_stages.scenes.package_files import package_file

sys.path.insert(0, str(Path(__file__).parent))
from browser import LIST, PARTLY_ANSWERED, PHOTO, DemoPage, near, session_of


def test_a_photo_two_boxes_a_streamed_answer_a_deleted_box_and_a_second_turn(demo, server, held_answers):
    page = demo.page
    demo.open_file(package_file(*PHOTO))
    area = demo.area()
    assert (area["width"], area["height"]) == (640, 427) and abs(area["x"] - area["y"]) < 0.01
    demo.drag((100, 60), (300, 260))
    demo.drag((400, 300), (620, 410))
    assert demo.numbers() == [1, 2]
    for number, box in ((1, (100, 60, 300, 260)), (2, (400, 300, 620, 410))):
        assert near(demo.shape(f".rt-mark[data-number='{number}'] .rt-box-shape"), demo.on_screen(box))
    page.fill("#rt-question textarea", "Is the same in")
    page.click(".rt-marks li[data-number='1'] .rt-put")
    page.keyboard.type(" as in")
    page.click(".rt-marks li[data-number='2'] .rt-put")
    assert page.input_value("#rt-question textarea") == "Is the same in [1] as in [2]"
    demo.ask()
    assert page.input_value("#rt-question textarea") == ""
    turn = session_of(server).conversations["nano"].turns[0]
    assert turn.asked.text == "Is the same in <region> as in <region>"
    for mark, box in zip(turn.asked.marks, ((100, 60, 300, 260), (400, 300, 620, 410)), strict=True):
        assert near(mark.box_xyxy, box, 1.5 / area["x"])
    page.fill("#rt-question textarea", "Read [1] and [2]")
    page.click(".rt-marks li[data-number='1'] .rt-delete")
    assert demo.numbers() == [2] and page.input_value("#rt-question textarea") == "Read and [2]"
    release = threading.Event()
    held_answers(release)
    page.fill("#rt-question textarea", "List everything with boxes, like [2].")
    page.click("#rt-send")
    page.wait_for_function(PARTLY_ANSWERED)  # it comes in pieces
    release.set()
    demo.wait_for_answer(2)
    turns = session_of(server).conversations["nano"].turns
    assert len(turns) == 2 and page.locator("#rt-chat-a .rt-turn").count() == 2
    page.fill("#rt-question textarea", "What is in [1]?")
    page.click("#rt-send")
    assert "no mark [1]" in demo.notice()
    demo.drag((20, 20), (80, 80))
    assert demo.numbers() == [2, 3]  # a number is never given twice


def test_boxes_of_an_answer_are_drawn_where_the_model_says_and_linked_with_their_words(demo, server):
    page = demo.page
    demo.open_example(1)
    demo.ask(LIST)
    turn = session_of(server).conversations["nano"].turns[-1]
    boxes = [piece for piece in turn.pieces if piece.kind == "box"]
    assert boxes
    for index, piece in enumerate(boxes):
        selector = f".rt-outline[data-box='A1b{index}']"
        assert near(demo.shape(f"{selector} rect"), demo.on_screen(piece.box_xyxy))
        assert page.locator(selector).is_visible()
        assert f"{piece.score:.2f}" in page.inner_text(f"#rt-chat-a .rt-box[data-boxes='A1b{index}']")
    words = page.locator("#rt-chat-a .rt-words").first
    ids = words.get_attribute("data-boxes").split()
    words.hover()
    page.wait_for_function("document.querySelectorAll('.rt-outline.on').length > 0")
    lit = page.eval_on_selector_all(".rt-outline.on", "nodes => nodes.map((node) => node.dataset.box)")
    assert sorted(lit) == sorted(ids)
    # The picture grows and shrinks with its page; boxes stay at their places.
    wide = demo.area()["x"]
    page.set_viewport_size({"width": 900, "height": 700})
    page.wait_for_function(
        "(wide) => { const [a, b] = [...document.querySelectorAll('.rt-picture')].map((n) =>"
        " [n.getBoundingClientRect().width / n.viewBox.baseVal.width, wide])[0]; return Math.abs(a - b) > 0.1; }",
        arg=wide,
    )
    assert near(demo.shape(".rt-outline[data-box='A1b0'] rect"), demo.on_screen(boxes[0].box_xyxy))


def test_marks_are_moved_resized_named_pointed_and_deleted_by_mouse_and_keys(demo):
    page = demo.page
    demo.open_file(package_file(*PHOTO))
    demo.drag((100, 100), (200, 180))
    demo.drag((200, 180), (260, 240))  # a corner
    assert near(demo.shape(".rt-mark[data-number='1'] .rt-box-shape"), demo.on_screen((100, 100, 260, 240)))
    demo.drag((180, 100), (230, 140))  # a border
    assert near(demo.shape(".rt-mark[data-number='1'] .rt-box-shape"), demo.on_screen((150, 140, 310, 280)))
    demo.drag((230, 140), (900, 900))  # no further than the picture reaches
    assert near(demo.shape(".rt-mark[data-number='1'] .rt-box-shape"), demo.on_screen((480, 287, 640, 427)))
    page.click(".rt-tools [data-tool=point]")
    demo.drag((50, 60), (50, 60))
    assert demo.numbers() == [1, 2] and page.locator(".rt-dot").count() == 1
    page.fill(".rt-marks li[data-number='2'] input", "roof")
    page.locator(".rt-marks li[data-number='2'] input").blur()
    assert page.locator(".rt-mark[data-number='2'] .rt-badge-text").text_content() == "2 roof"
    page.click(".rt-marks li[data-number='2'] .rt-what")
    assert page.input_value("#rt-question textarea") == "What is at [2]?"
    demo.drag((50, 60), (50, 60))  # selects it
    page.keyboard.press("Shift+ArrowRight")
    page.keyboard.press("Delete")
    assert demo.numbers() == [1]
    page.click("[data-do=clear]")
    assert demo.numbers() == []


def test_another_model_and_two_side_by_side(demo, server):
    page = demo.page
    demo.open_example(1)
    demo.ask(LIST)
    page.click("#rt-model input")
    page.get_by_role("option", name="nano-clip").click()
    page.wait_for_function("document.querySelectorAll('#rt-chat-a .rt-turn').length === 0")
    demo.ask("What is in [1]?")
    session = session_of(server)
    assert [len(session.conversations[name].turns) for name in ("nano", "nano-clip")] == [1, 1]
    page.click("#rt-other input")
    page.get_by_role("option", name="nano", exact=True).click()
    page.wait_for_selector("#rt-chat-b .rt-turn")
    demo.ask(LIST, slot="b")
    assert [len(session.conversations[name].turns) for name in ("nano", "nano-clip")] == [2, 2]
    a, b = (page.locator(f"#rt-chat-{slot}").bounding_box() for slot in "ab")
    assert a["x"] + a["width"] <= b["x"] and abs(a["y"] - b["y"]) < 2
    assert page.locator(".rt-outline[data-slot=B][data-last]").count() >= 1


def test_stop_ends_an_answer_and_the_next_question_is_answered(demo, server, held_answers):
    page = demo.page
    demo.open_example(1)
    held_answers(session_of(server).stop)
    page.fill("#rt-question textarea", LIST)
    page.click("#rt-send")
    page.wait_for_function(PARTLY_ANSWERED)
    assert page.locator("#rt-model input").is_disabled()  # or the answer would stand under another model's name
    page.click("#rt-stop")
    page.wait_for_selector("#rt-chat-a .rt-answer[data-state=stopped]")
    assert "does not remember" in page.inner_text("#rt-chat-a .rt-remark")
    page.wait_for_selector("#rt-send", state="visible")
    assert page.locator("#rt-model input").is_enabled()
    demo.ask("What is in [1]?")
    assert [turn.state for turn in session_of(server).conversations["nano"].turns] == ["stopped", "done"]


def test_the_towers_are_looked_at_and_the_conversation_is_saved(demo, browser, tmp_path):
    page = demo.page
    demo.open_example(1)
    demo.ask(LIST)
    for tab, button, panel in (
        ("Region similarity", "#rt-heat", "#rt-heat-panel"),
        ("Tower tokens (PCA)", "#rt-pca", "#rt-pca-panel"),
    ):
        page.get_by_role("tab", name=tab).click()
        page.click(button)
        page.wait_for_selector(f"{panel} img")
        width, height = page.eval_on_selector(
            f"{panel} img", "async (n) => (await n.decode(), [n.naturalWidth, n.naturalHeight])"
        )
        area = demo.area()
        assert (width, height) == (area["width"], area["height"])
    with page.expect_download() as waiting:
        page.click("#rt-save")
    waiting.value.save_as(tmp_path / "saved.html")
    assert waiting.value.suggested_filename == "conversation.html"
    saved = browser.new_page()
    saved.goto((tmp_path / "saved.html").as_uri())
    assert LIST in saved.inner_text("body")
    drawn, picture = (
        saved.locator("g[data-box] rect").first.bounding_box(),
        saved.locator("svg[role=img]").bounding_box(),
    )
    expected = page.eval_on_selector(
        ".rt-outline[data-kind=found] rect", "n => ['x', 'y', 'width', 'height'].map((k) => +n.getAttribute(k))"
    )
    scale = picture["width"] / demo.area()["width"]
    line = 4 * scale
    assert abs(drawn["x"] - picture["x"] - expected[0] * scale) <= line
    assert abs(drawn["width"] - expected[2] * scale) <= line
    saved.close()


def test_settings_are_folded_and_the_region_prompt_can_be_chosen(demo, server):
    page = demo.page
    demo.open_example(1)
    assert not page.locator("#rt-region-prompt").is_visible()
    page.click("#rt-settings button")
    page.locator("#rt-region-prompt label", has_text="overlay").click()
    demo.ask("What is in [1]?")
    assert session_of(server).conversations["nano"].region_prompt == "overlay"
    page.click("#rt-restart")
    page.wait_for_selector("#rt-chat-a .rt-empty")
    assert session_of(server).conversations["nano"].turns == []


def test_two_browsers_do_not_see_each_other(demo, browser, server):
    other = DemoPage(browser, server.url)
    demo.open_example(1)
    demo.ask("What is in [1]?")
    other.open_example(2)
    assert other.page.locator(".rt-turn").count() == 0
    other.ask("Read [2].")
    assert demo.page.locator(".rt-turn").count() == 1
    assert "Read [2]." not in demo.page.inner_text("#rt-chat-a")
    other.close()


EVIL = "<img src=x onerror='window.hacked=1'><script>window.hacked=2</script> ${window.hacked=3} {{hacked}}"


def test_html_of_users_and_models_stays_text(demo, monkeypatch):
    """Whatever the user types and names, and the model answers."""

    def says_evil(self, text, boxes=()):
        yield EVIL
        self.last_answer = SimpleNamespace(text=EVIL, boxes=SimpleNamespace(status="none", scores=[]))

    monkeypatch.setattr(ChatSession, "stream", says_evil)
    page = demo.page
    demo.open_example(1)
    page.fill(".rt-marks li[data-number='1'] input", EVIL[:40])
    page.locator(".rt-marks li[data-number='1'] input").blur()
    demo.ask(f"{EVIL} [1]")
    assert page.inner_text("#rt-chat-a .rt-answer").strip() == EVIL
    assert page.inner_text("#rt-chat-a .rt-question").strip() == f"{EVIL} [1]"
    assert page.locator("#rt-chat-a img, #rt-chat-a script, #rt-stage script").count() == 0
    assert page.locator(".rt-mark[data-number='1'] .rt-badge-text").text_content() == f"1 {EVIL[:40]}"
    page.wait_for_timeout(300)
    assert page.evaluate("window.hacked") is None
