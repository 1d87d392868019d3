"""`regiontower swap` as a user types it, and its page."""

import json
import re
import sys
from pathlib import Path

import pytest

from regiontower.benchmarks._tiny_llavas import save_as, tiny_llava, tiny_tower
from regiontower.cli import main
from regiontower.mllm.swap_on_disk import VERIFY

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGES = {name: (DOCS / name).read_text(encoding="utf-8") for name in ("swap.md", "serving.md")}


@pytest.fixture
def run(monkeypatch, capsys):
    """`run(*arguments)` -> (status, stdout, stderr) of `regiontower swap`, in this process."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["regiontower", "swap", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        return stopped.value.code, *capsys.readouterr()

    return call


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("a folder")
    tiny_tower("RICE").save_pretrained(root / "rice")
    return save_as(*tiny_llava("Llava"), root / "llava", "v4", 2), root / "rice"


def test_swap_writes_a_model_and_says_what_changed(run, folders, tmp_path):
    llava, rice = folders
    options = ("--verify", "bytes", "--image-size", "84", "--feature-layer", "-1", "--dtype", "bf16")
    status, output, _ = run(llava, "--tower", rice, "--out", tmp_path / "out", *options, "--json")
    said = json.loads(output.strip().splitlines()[-1])
    assert status == 0 and said["after"]["image_tokens"] == 36 and said["after"]["feature_layer"] == -1
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    status, output, _ = run(llava, "--tower", rice, "--out", tmp_path / "regions", "--verify", "bytes", "--regions")
    assert status == 0 and "rice_vision_model" in output and "region_projector" in output
    assert json.loads((tmp_path / "regions" / "config.json").read_text())["model_type"] == "region_llava"


def test_a_mistake_is_one_line(run, folders, tmp_path):
    llava, rice = folders
    for options in (("--verify", "no"), ("--keep-projector",), ("--dtype", "int4")):
        status, _, said = run(llava, "--tower", rice, "--out", tmp_path / "out", *options)
        assert status == 1 and said.startswith("regiontower: ") and said.count("\n") == 1
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", PAGES)
def test_the_pages_run(name):
    blocks = re.findall(r"^```python\n(.*?)^```", PAGES[name], flags=re.M | re.S)
    assert blocks
    for block in blocks:
        exec(compile(block, f"docs/{name}", "exec"), {"__name__": "__main__"})


def test_the_page_names_every_way_to_verify_and_that_of_serving_says_what_was_not_run():
    assert all(f"`{way}`" in PAGES["swap.md"] for way in VERIFY)
    assert "nothing on this page was run with vLLM" in PAGES["serving.md"]
