"""The page in headless Chromium: drawing, asking, boxes at the right pixels, and what a phone sees."""

import io
import sys
import time
from pathlib import Path

import pytest
from PIL import Image
from transformers import StoppingCriteria, StoppingCriteriaList

from regiontower.train_stages.scenes.package_files import package_file

sys.path.insert(0, str(Path(__file__).parent))
from browser import DemoPage, chromium

PHOTO = ("sklearn", "datasets/images/china.jpg")
LIST = "List everything with boxes."


@pytest.fixture(scope="module")
def browser():
    with chromium() as running:
        yield running


@pytest.fixture
def demo(browser, server):
    page = DemoPage(browser, server.url)
    yield page
    assert page.errors == [] and page.elsewhere == []
    page.close()


def session_of(server):
    """The session that was used last: the page's."""
    return max(server.engine.sessions._sessions.values(), key=lambda session: session.used)


def near(found, expected, pixels=1.5):
    return all(abs(a - b) <= pixels for a, b in zip(found, expected, strict=True))


def test_a_photo_two_boxes_a_streamed_answer_a_deleted_box_and_a_second_turn(demo, server):
    page = demo.page
    demo.open_file(package_file(*PHOTO))
    area = demo.area()
    assert (area["width"], area["height"]) == (640, 427) and abs(area["x"] - area["y"]) < 0.01
    demo.drag((100, 60), (300, 260))
    demo.drag((400, 300), (620, 410))
    assert demo.numbers() == [1, 2]
    for number, box in ((1, (100, 60, 300, 260)), (2, (400, 300, 620, 410))):
        assert near(demo.shape(f".rt-mark[data-number='{number}'] .rt-box-shape"), demo.on_screen(box))
    page.evaluate(
        """() => {
          window.seen = [];
          new MutationObserver(() => {
            const node = document.querySelector("#rt-chat-a .rt-answer");
            if (node) window.seen.push([node.dataset.state, node.textContent]);
          }).observe(document.querySelector("#rt-chat-a"), {subtree: true, childList: true, characterData: true});
        }"""
    )
    page.fill("#rt-question textarea", "Is the same in")
    page.click(".rt-marks li[data-number='1'] .rt-put")
    page.keyboard.type(" as in")
    page.click(".rt-marks li[data-number='2'] .rt-put")
    assert page.input_value("#rt-question textarea") == "Is the same in [1] as in [2]"
    demo.ask()
    seen = page.evaluate("window.seen")
    assert len({text for state, text in seen if state == "answering"}) >= 2  # it came in pieces
    assert page.input_value("#rt-question textarea") == ""
    turn = session_of(server).conversations["nano"].turns[0]
    assert turn.asked.text == "Is the same in <region> as in <region>"
    for mark, box in zip(turn.asked.marks, ((100, 60, 300, 260), (400, 300, 620, 410)), strict=True):
        assert near(mark.box_xyxy, box, 1.5 / area["x"])
    page.fill("#rt-question textarea", "Read [1] and [2]")
    page.click(".rt-marks li[data-number='1'] .rt-delete")
    assert demo.numbers() == [2] and page.input_value("#rt-question textarea") == "Read and [2]"
    demo.ask("What is in [2]?")
    assert len(session_of(server).conversations["nano"].turns) == 2
    assert page.locator("#rt-chat-a .rt-turn").count() == 2
    demo.ask("What is in [1]?")
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
    page.set_viewport_size({"width": 900, "height": 700})
    page.wait_for_timeout(300)
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


class Slowly(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        time.sleep(0.25)
        return input_ids.new_zeros(len(input_ids), dtype=bool)


def test_stop_ends_an_answer_and_the_next_question_is_answered(demo, server, monkeypatch):
    page, model = demo.page, server.engine.models[0].model
    demo.open_example(1)
    generate = model.generate

    def slow(stopping_criteria, **options):
        return generate(stopping_criteria=StoppingCriteriaList([*stopping_criteria, Slowly()]), **options)

    monkeypatch.setattr(model, "generate", slow)
    page.fill("#rt-question textarea", LIST)
    page.click("#rt-send")
    page.wait_for_function("document.querySelector('#rt-chat-a .rt-answer')?.textContent.length > 3")
    page.click("#rt-stop")
    page.wait_for_selector("#rt-chat-a .rt-answer[data-state=stopped]")
    assert "does not remember" in page.inner_text("#rt-chat-a .rt-remark")
    page.wait_for_selector("#rt-send", state="visible")
    monkeypatch.undo()
    demo.ask("What is in [1]?")
    assert [turn.state for turn in session_of(server).conversations["nano"].turns] == ["stopped", "done"]


def test_bad_files_get_a_message_and_the_page_lives_on(demo, tmp_path):
    page = demo.page
    good = io.BytesIO()
    Image.new("RGB", (64, 48), "red").save(good, "JPEG")
    for name, data, says in (
        ("empty.png", b"", "empty|0 bytes"),
        ("evil.svg", b"<svg xmlns='http://www.w3.org/2000/svg'><script>window.hacked = 1</script></svg>", "SVG"),
        ("photo.heic.jpg", b"\0\0\0\x18ftypheic" + bytes(64), "HEIC"),
        ("cut.jpg", good.getvalue()[: len(good.getvalue()) // 2], "damaged or truncated"),
        ("text.png", b"I am no picture at all", "text file"),
    ):
        (tmp_path / name).write_bytes(data)
        page.evaluate("document.querySelectorAll('.rt-notice').forEach((node) => node.remove())")
        page.set_input_files("#rt-upload input[type=file]", tmp_path / name)
        page.wait_for_function(
            "(says) => new RegExp(says).test(document.querySelector('.rt-notice')?.textContent || '')", arg=says
        )
    assert page.evaluate("window.hacked") is None
    (tmp_path / "good.png").write_bytes(good.getvalue())
    demo.open_file(tmp_path / "good.png")
    assert "JPEG picture under another extension" in demo.notice()
    assert demo.area()["width"] == 64


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


def test_a_phone_shows_all_in_one_column_and_draws_by_finger(browser, server):
    demo = DemoPage(
        browser, server.url, viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True, color_scheme="dark"
    )
    page = demo.page
    demo.open_example(1)
    assert page.evaluate("document.documentElement.scrollWidth") <= 391
    picture, question = (page.locator(s).bounding_box() for s in (".rt-picture", "#rt-question"))
    assert picture["width"] <= 390 and question["y"] > picture["y"] + picture["height"]
    before = demo.numbers()
    x1, y1, x2, y2 = demo.on_screen((20, 20, 110, 90))
    touch = page.context.new_cdp_session(page)
    for kind, spots in (
        ("touchStart", [(x1, y1)]),
        ("touchMove", [((x1 + x2) / 2, y2)]),
        ("touchMove", [(x2, y2)]),
        ("touchEnd", []),
    ):
        touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": [{"x": x, "y": y} for x, y in spots]})
    assert demo.numbers() == [*before, max(before) + 1]
    assert near(
        demo.shape(f".rt-mark[data-number='{max(before) + 1}'] .rt-box-shape"), demo.on_screen((20, 20, 110, 90)), 2.5
    )
    demo.ask("What is in [1]?")
    assert page.locator("#rt-chat-a .rt-answer").inner_text().strip()
    demo.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark_are_both_readable(browser, server, scheme):
    demo = DemoPage(browser, server.url, color_scheme=scheme)
    page = demo.page
    demo.open_example(1)
    demo.ask("What is in [1]?")
    light = {}
    for selector in ("#rt-chat-a .rt-answer", ".rt-marks input", ".rt-tools button", ".rt-question"):
        light[selector] = page.eval_on_selector(
            selector,
            """(node) => {
              const level = (css) => css.match(/[\\d.]+/g).slice(0, 3).reduce((sum, part) => sum + +part, 0) / 765;
              const paint = (element) => getComputedStyle(element).backgroundColor;
              let behind = node;
              while (behind.parentElement && /rgba\\(0, 0, 0, 0\\)|transparent/.test(paint(behind))) {
                behind = behind.parentElement;
              }
              return [level(getComputedStyle(node).color), level(paint(behind))];
            }""",
        )
    for text, behind in light.values():
        assert abs(text - behind) > 0.4
        assert (text > behind) == (scheme == "dark")
    demo.close()


def test_a_webcam_picture_opens(demo):
    page = demo.page
    page.locator("#rt-upload [aria-label*='ebcam'], #rt-upload button[title*='ebcam']").first.click()
    page.locator("#rt-upload button", has_text="access").or_(page.locator("#rt-upload [title*='access']")).first.click()
    page.locator("#rt-upload button[aria-label='capture photo']").click()
    demo.wait_for_picture()
    assert demo.area()["width"] > 100
