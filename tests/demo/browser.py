"""Headless Chromium for the tests of the page."""

import base64
import shutil
from contextlib import contextmanager

import pytest

PHOTO = ("sklearn", "datasets/images/china.jpg")
LIST = "List everything with boxes."
PARTLY_ANSWERED = """() => {
  const answers = document.querySelectorAll("#rt-chat-a .rt-answer"), last = answers[answers.length - 1];
  return last?.dataset.state === "answering" && last.textContent.replace("▍", "").trim().length > 1;
}"""
CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
FILE_INPUT = "#rt-picker input[type=file]"
TIMEOUT = 90_000  # milliseconds; only for machines that do much else


@contextmanager
def chromium():
    """A browser; skips with a reason where Playwright or Chromium is absent."""
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    path = next(filter(None, map(shutil.which, CHROMIUM)), None)
    if path is None:
        pytest.skip("Chromium is not installed (Debian: apt-get install chromium)")
    with playwright.sync_playwright() as driver:
        arguments = ["--no-sandbox", "--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream"]
        browser = driver.chromium.launch(executable_path=path, args=arguments)
        yield browser
        browser.close()


class DemoPage:
    """The demo in a browser, and what a user does there."""

    def __init__(self, browser, url: str, **context):
        self.context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **context})
        self.context.set_default_timeout(TIMEOUT)
        self.page = self.context.new_page()
        self.errors: list[str] = []
        self.elsewhere: list[str] = []
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", lambda request: self._note(request.url, url))
        self.page.goto(url)
        self.page.wait_for_selector(".rt-example", state="attached")
        self.page.wait_for_selector(".rt-stage", state="attached")

    def _note(self, wanted: str, url: str) -> None:
        if not wanted.startswith((url, "data:", "blob:")):
            self.elsewhere.append(wanted)

    def open_file(self, path) -> None:
        self.page.set_input_files(FILE_INPUT, path)
        self.wait_for_picture()

    def paste(self, data: bytes) -> None:
        """Paste a PNG into the page."""
        self._give(data, "new ClipboardEvent('paste', {clipboardData: data, bubbles: true, cancelable: true})")

    def drop(self, data: bytes) -> None:
        """Drop a PNG onto the page."""
        self._give(data, "new DragEvent('drop', {dataTransfer: data, bubbles: true, cancelable: true})")

    def _give(self, data: bytes, event: str) -> None:
        self.page.evaluate(
            f"""(text) => {{
              const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0)), data = new DataTransfer();
              data.items.add(new File([bytes], "image.png", {{type: "image/png"}}));
              document.body.dispatchEvent({event});
            }}""",
            base64.b64encode(data).decode(),
        )

    def wait_for_width(self, width: int) -> None:
        """Until a picture so wide is shown."""
        self.page.wait_for_function(
            "(width) => document.querySelector('.rt-picture').viewBox.baseVal?.width === width", arg=width
        )

    def open_example(self, index: int) -> None:
        self.page.locator(".rt-example").nth(index).click()
        self.wait_for_picture()

    def wait_for_picture(self) -> None:
        self.page.wait_for_selector(".rt-stage:not([data-empty]) .rt-image[href^='data:image']")
        self.page.wait_for_function("document.querySelector('.rt-picture').getBoundingClientRect().width > 50")

    def area(self) -> dict[str, float]:
        """Where the picture is on the screen, and how many of its pixels there are a screen pixel."""
        self.page.locator(".rt-picture").scroll_into_view_if_needed()
        return self.page.evaluate(
            """() => {
              const svg = document.querySelector(".rt-picture"), box = svg.getBoundingClientRect();
              const [,, width, height] = svg.getAttribute("viewBox").split(" ").map(Number);
              return {left: box.left, top: box.top, x: box.width / width, y: box.height / height, width, height};
            }"""
        )

    def on_screen(self, box):
        """A box of the picture in screen pixels."""
        area = self.area()
        return [
            area["left"] + box[0] * area["x"],
            area["top"] + box[1] * area["y"],
            area["left"] + box[2] * area["x"],
            area["top"] + box[3] * area["y"],
        ]

    def drag(self, start, end) -> None:
        """Drag the mouse between two places of the picture, in its pixels."""
        x1, y1, x2, y2 = self.on_screen([*start, *end])
        mouse = self.page.mouse
        mouse.move(x1, y1)
        mouse.down()
        mouse.move((x1 + x2) / 2, (y1 + y2) / 2, steps=3)
        mouse.move(x2, y2, steps=3)
        mouse.up()

    def shape(self, selector: str) -> list[float]:
        """Edges of an SVG rectangle on the screen, without its line."""
        return self.page.locator(selector).first.evaluate(
            """(node) => {
              const area = node.ownerSVGElement.getScreenCTM(), box = node.getBBox();
              const from = new DOMPoint(box.x, box.y).matrixTransform(area);
              const to = new DOMPoint(box.x + box.width, box.y + box.height).matrixTransform(area);
              return [from.x, from.y, to.x, to.y];
            }"""
        )

    def numbers(self) -> list[int]:
        """Numbers of the marks on the picture."""
        return self.page.eval_on_selector_all(".rt-mark", "nodes => nodes.map((node) => +node.dataset.number)")

    def ask(self, text: str | None = None, slot: str = "a") -> None:
        """Send a question (or what stands in the box) and wait for the whole answer."""
        before = self.page.locator(f"#rt-chat-{slot} .rt-turn").count()
        if text is not None:
            self.page.fill("#rt-question textarea", text)
        self.page.click("#rt-send")
        self.wait_for_answer(before + 1, slot)

    def wait_for_answer(self, count: int, slot: str = "a") -> None:
        """Until so many questions are answered and the next one can be sent."""
        self.page.wait_for_function(
            """([slot, count]) => {
              const answers = document.querySelectorAll(`#rt-chat-${slot} .rt-answer`);
              const send = document.querySelector("#rt-send");
              return answers.length === count && [...answers].every((node) => node.dataset.state !== "answering")
                && send && send.getBoundingClientRect().width > 0;
            }""",
            arg=[slot, count],
        )

    def notice(self, says: str = "") -> str:
        """The message on the page, once it holds these words."""
        self.page.wait_for_function(
            "(says) => document.querySelector('.rt-notice')?.textContent.includes(says)", arg=says
        )
        return self.page.inner_text(".rt-notice")

    def close(self) -> None:
        self.context.close()


def session_of(server):
    """The session that was used last: the page's."""
    return max(server.engine.sessions._sessions.values(), key=lambda session: session.used)


def near(found, expected, pixels=1.5):
    """Whether numbers differ by no more than so many pixels, one by one."""
    return all(abs(a - b) <= pixels for a, b in zip(found, expected, strict=True))
