import base64
import io
import re

import numpy as np
import pytest
from PIL import Image

from regiontower.eval.report import write_report
from regiontower.eval.run import EvalResult
from regiontower.eval.scoring import summarise
from regiontower.eval.task_kinds import HEADLINES, MEANINGS, METRICS, SCORED_METRICS


@pytest.fixture
def result(records_path, tmp_path):
    """As `evaluate` would return it, without lmms-eval."""
    image = str(records_path.parent / "my pictures" / "photo 0.png")
    common = {"image": image, "image_id": "a", "width": 100, "height": 80, "region_index": 0}
    where = {"question": "Where is the <b>red</b> box?", "prompt_boxes": [], "target": [10.0, 10.0, 50.0, 40.0]}
    found = {"status": "boxes", "predicted_xyxy": [60.0, 20.0, 90.0, 70.0], "iou": 0.0, "parsed": True}
    rows = [
        {"doc_id": 0, **common, **where, **found, "answer": "[600, 250, 900, 875]", "correct": False},
        {"doc_id": 1, **common, **where, **found, "predicted_xyxy": None, "answer": "x" * 500, "correct": False},
    ]
    refer = {"question": "What is in <region>?", "prompt_boxes": [[10.0, 10.0, 50.0, 40.0]]}
    refer |= {"answer": "", "target": ["the red box"]}
    samples = {
        "regiontower_grounding": rows,
        "regiontower_referring": [{"doc_id": 0, **common, **refer, "correct": True}],
        "regiontower_reading": [],
        "regiontower_absent": [
            {"doc_id": 0, **common, **where, **found, "target": [], "iou": None, "answer": "a", "correct": False},
            {"doc_id": 1, **common, **where, "target": [], "predicted_xyxy": None, "answer": "none", "correct": True},
        ],
    }
    results = {
        "tasks": {name: summarise(name.removeprefix("regiontower_"), found) for name, found in samples.items()},
        "model": "a <model>",
        "weights_sha256": "0" * 64,
        "box_format": {"model": "int1000", "scored": "int1000"},
        "data": {"path": str(records_path), "sha256": "1" * 64, "format": "records", "records": 4, "bad_records": []},
        "arguments": {"limit": None, "device": "cpu"},
        "versions": {"torch": "2"},
        "seconds": 1.0,
    }
    return EvalResult(results, samples, tmp_path)


def pictures(html: str) -> list[Image.Image]:
    return [
        Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")
        for data in re.findall(r"data:image/\w+;base64,([\w+/=]+)", html)
    ]


def test_the_page_needs_no_other_file(result, tmp_path):
    curve = tmp_path / "loss.png"
    Image.new("RGB", (30, 20), (0, 0, 255)).save(curve)
    baselines = {"regiontower_grounding": {"whole_image": result.tasks["regiontower_grounding"]}}
    html = write_report(
        result, tmp_path / "report", curves={"stage 1": curve}, who="mine", beside=baselines
    ).read_text()
    assert not re.findall(r'(?:src|href)="(?!data:)', html)
    assert "stage 1" in html and "whole image" in html and "<td>mine</td>" in html and "no rows" in html
    assert "Where is the &lt;b&gt;red&lt;/b&gt; box?" in html and "a &lt;model&gt;" in html  # escaped
    assert "x" * 161 not in html and "(no answer)" in html
    shown = pictures(html)
    assert len(shown) == 6
    assert shown[0].getpixel((5, 5)) == (0, 0, 255)


def test_true_and_predicted_boxes_are_drawn_where_they_are(result, tmp_path):
    both, only_true, *_ = pictures(write_report(result, tmp_path / "report").read_text())

    def pink_and_green(picture):
        pixels = np.asarray(picture).astype(int)
        red, green, blue = pixels[..., 0], pixels[..., 1], pixels[..., 2]
        return (red > 150) & (blue > 150) & (green < 120), (green > 150) & (red < 120) & (blue < 120)

    pink, green = pink_and_green(both)
    assert pink[40:60, 60:92].any() and not pink[:, :55].any()
    assert green[15:40, 8:14].any() and not green[:, 56:].any()
    pink, green = pink_and_green(only_true)
    assert green.any() and not pink.any()


def test_the_gallery_is_limited_and_spread(result, tmp_path):
    html = write_report(result, tmp_path / "report", gallery=1).read_text()
    assert len(pictures(html)) == 3  # one for each task with rows


def test_every_figure_is_explained():
    assert set(MEANINGS) == {metric for metrics in METRICS.values() for metric in metrics} | set(SCORED_METRICS)
    assert all(HEADLINES[kind] in metrics for kind, metrics in METRICS.items())


def test_the_page_in_a_browser(result, tmp_path):
    """Every picture is shown, nothing is asked of the network, nothing sticks out, on a wide and on a narrow screen."""
    import shutil

    browser_path = shutil.which("chromium")
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if browser_path is None:
        pytest.skip("there is no chromium here (apt-get install chromium)")
    page_path = write_report(result, tmp_path / "report")
    asked, said = [], []
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        page = browser.new_page()
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        for width in (1200, 400):
            page.set_viewport_size({"width": width, "height": 900})
            page.goto(page_path.as_uri(), timeout=120_000)
            broken = page.evaluate("[...document.images].filter(image => !image.naturalWidth).length")
            assert broken == 0 and page.evaluate("document.images.length") == 5
            assert page.evaluate("document.documentElement.scrollWidth") <= width
        browser.close()
    assert all(url.startswith(("file:", "data:")) for url in asked) and not said
