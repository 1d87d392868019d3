"""The page in headless Chromium: how pictures come into it, and what it looks like on a phone, light and dark."""

import sys
from pathlib import Path

import pytest
from PIL import Image

from regiontower.train_stages.scenes.package_files import package_file

sys.path.insert(0, str(Path(__file__).parent))
from bad_files import claimed_png, encoded
from browser import FILE_INPUT, PHOTO, DemoPage, near, session_of


def test_bad_files_get_a_message_and_the_page_lives_on(demo, server, tmp_path):
    page = demo.page
    photo = Path(package_file(*PHOTO)).read_bytes()
    most = server.engine.limits.file_bytes
    for name, data, says in (
        ("empty.png", b"", "is empty (0 bytes)"),
        ("evil.svg", b"<svg><script>window.hacked = 1</script></svg>", "is an SVG drawing"),
        ("photo.heic.jpg", b"\0\0\0\x18ftypheic" + bytes(64), "is a HEIC photo"),
        ("cut.jpg", photo[: len(photo) // 2], ": the image is damaged or truncated"),
        ("80mp.png", claimed_png(8_000, 10_000), ": 8000 x 10000 = 80000000 pixels is more than the limit of 50000000"),
        ("200mp.png", claimed_png(20_000, 10_000), "has far more pixels than are opened here"),
        ("bomb.png", claimed_png(60_000, 60_000), "has far more pixels than are opened here"),
        ("text.png", b"I am no picture at all", "is a text file"),
        ("large.png", bytes(most + 1), "has 20.0 MB; the limit is 20 MB"),
    ):
        (tmp_path / name).write_bytes(data)
        page.set_input_files(FILE_INPUT, tmp_path / name)
        demo.notice(f"{name} {says}".replace(" :", ":"))
    assert page.evaluate("window.hacked") is None
    (tmp_path / "good.png").write_bytes(photo)
    demo.open_file(tmp_path / "good.png")
    assert "good.png is a JPEG picture under another extension" in demo.notice("JPEG")
    assert demo.area()["width"] == 640


def test_a_file_that_does_not_arrive_is_said_and_can_be_chosen_again(demo):
    page = demo.page
    page.route("**/upload*", lambda route: route.fulfill(status=500, body="no"))
    page.set_input_files(FILE_INPUT, package_file(*PHOTO))
    demo.notice("china.jpg did not arrive; choose it again.")
    page.unroute("**/upload*")
    demo.open_file(package_file(*PHOTO))
    assert page.locator("#rt-notice .rt-notice").count() == 0


def test_a_webcam_picture_opens(demo):
    page = demo.page
    page.click("#rt-picker [data-way=webcam]")
    page.wait_for_function("document.querySelector('#rt-picker video').videoWidth > 100")
    page.click("#rt-picker [data-way=take]")
    demo.wait_for_picture()
    assert demo.area()["width"] > 100
    assert page.evaluate("document.querySelector('#rt-picker video').srcObject") is None  # the webcam is let go


def test_a_picture_is_pasted_and_another_one_opened_after_it(demo, server):
    page = demo.page
    demo.paste(encoded(Image.new("RGB", (90, 60), "red"), "PNG"))
    demo.wait_for_picture()
    first = session_of(server)
    assert demo.area()["width"] == 90 and first.image.getpixel((45, 30)) == (255, 0, 0)
    demo.drag((10, 10), (60, 40))
    demo.open_file(package_file(*PHOTO))
    demo.wait_for_width(640)
    assert demo.numbers() == []
    assert first.token not in server.engine.sessions
    demo.drop(encoded(Image.new("RGB", (70, 60), "blue"), "PNG"))
    demo.wait_for_width(70)
    assert page.url == server.url  # a browser left alone would show the dropped file


def test_an_examples_questions_are_offered_again_and_again(demo):
    page = demo.page
    demo.open_example(1)
    for _ in range(2):
        page.fill("#rt-question textarea", "")
        page.locator("#rt-offers label", has_text="Read [2].").click()
        page.wait_for_function("document.querySelector('#rt-question textarea').value === 'Read [2].'")
    page.fill("#rt-question textarea", "")
    page.click("#rt-find")
    page.wait_for_function("document.querySelector('#rt-question textarea').value === 'Find the '")


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
              const canvas = document.createElement("canvas").getContext("2d");
              const paint = (css) => { canvas.fillStyle = css; canvas.fillRect(0, 0, 1, 1); };
              const level = () => [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3).reduce((a, b) => a + b) / 765;
              const above = [node];
              while (above[0].parentElement) above.unshift(above[0].parentElement);
              above.forEach((element) => paint(getComputedStyle(element).backgroundColor));
              const behind = level();
              paint(getComputedStyle(node).color);
              return [level(), behind];
            }""",
        )
    for text, behind in light.values():
        assert abs(text - behind) > 0.4
        assert (text > behind) == (scheme == "dark")
    demo.close()
