"""`regiontower label` as a user types it, and the page of what it made."""

import json
import sys

import pytest
from PIL import Image, ImageDraw, ImageFont

from regiontower.cli import main
from regiontower.train_stages.label.preview import preview_page
from regiontower.train_stages.masks import encode_mask
from regiontower.train_stages.record_io import read_records, write_records
from regiontower.train_stages.records import Mask, Record, Region
from regiontower.vision_towers.errors import UserError


@pytest.fixture
def run(monkeypatch, capsys):
    """`run(*arguments)` -> (status, stdout, stderr) of `regiontower label`, in this process."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["regiontower", "label", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        return stopped.value.code, *capsys.readouterr()

    return call


@pytest.fixture
def signs(tmp_path):
    """Two pictures of a word each."""
    folder = tmp_path / "my signs"
    folder.mkdir()
    for word in ("HELLO", "TOWER"):
        picture = Image.new("RGB", (200, 100), "white")
        ImageDraw.Draw(picture).text((30, 30), word, fill="black", font=ImageFont.load_default(30))
        picture.save(folder / f"{word}.png")
    return folder


def test_text_is_labelled_and_drawn(run, signs, tmp_path):
    pytest.importorskip("rapidocr")
    pytest.importorskip("onnxruntime")
    status, out, error = run("rice-ocr", signs, "--out", tmp_path / "out", "--per-shard", 1, "--json")
    assert status == 0, error
    found = json.loads(out.splitlines()[-1])
    assert (found["shards"], found["images"], found["records"], found["regions"]) == (2, 2, 2, 2)
    assert found["statistics"] == {
        "regions_per_image": 1.0,
        "image_text": None,
        "region_text": 1.0,
        "counted_in": "words",
    }
    (record,) = read_records(tmp_path / "out" / "00001.jsonl", check_images=True).records
    assert record.regions[0].ocr == "TOWER"
    assert "img" in error  # the bar
    page = tmp_path / "page.png"
    status, out, error = run("preview", tmp_path / "out", page, "--json")
    assert status == 0 and json.loads(out)["images"] == 2, error
    with Image.open(page) as drawn:
        assert drawn.width == 840
    status, out, error = run("rice-ocr", signs, "--out", tmp_path / "out", "--per-shard", 2)
    assert status == 1 and error.startswith("regiontower: ") and "per_shard: 1 there, 2 now" in error
    assert len(error.strip().splitlines()) == 1


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (("rice-ocr", "nowhere"), "no such folder of images"),
        (("rice-ocr", "nowhere", "--form", "tar"), "--form must be one of jsonl, webdataset"),
        (("rice-ocr", "nowhere", "--engine", "spark"), "--engine must be one of local, ray"),
        (("rice-objects", "nowhere", "--tower", "x", "--clusters", "2", "--proposals", "best"), "--proposals"),
        (("rice-objects", "nowhere", "--tower", "x", "--clusters", "2", "--branches", "3"), "between 1 and the 2"),
        (("granular", "nowhere", "--scorer", "x", "--detector", "y"), "give either --tags or --tag-model"),
        (("rice-objects", "nowhere", "--tower", "./x", "--clusters", "2"), "no model can be opened at './x'"),
        (("vesl", "nowhere", "--detector", "./x"), "no model can be opened at './x'"),
    ],
)
def test_a_mistake_is_one_line(run, tmp_path, monkeypatch, arguments, sentence):
    monkeypatch.chdir(tmp_path)
    status, _, error = run(*arguments, "--out", "out")
    assert status == 1 and error.startswith("regiontower: ") and len(error.strip().splitlines()) == 1
    assert sentence in error


@pytest.mark.parametrize("engine", ["rice-ocr", "rice-objects", "vesl", "granular"])
def test_every_engine_has_the_shared_options(engine):
    """Under their own names, each once, with one default."""
    import typer.main

    from regiontower.label_commands import label

    command = typer.main.get_command(label).commands[engine]
    options = [name for parameter in command.params for name in parameter.opts]
    shared = ["--out", "--form", "--format", "--image-root", "--per-shard", "--batch-size", "--engine", "--processes"]
    for name in [*shared, "--near-duplicates", "--device", "--overwrite", "--json"]:
        assert options.count(name) == 1, name
    defaults = {parameter.name: parameter.default for parameter in command.params}
    assert (defaults["form"], defaults["per_shard"], defaults["processes"]) == ("jsonl", 1000, 1)
    assert command.params[0].name == "images"
    assert {parameter.name for parameter in command.params if parameter.required} >= {"images", "out"}


def test_help_has_all_engines(run):
    status, out, _ = run("--help")
    assert status == 0
    assert all(name in out for name in ("rice-ocr", "rice-objects", "vesl", "granular", "preview"))


def test_a_page_shows_boxes_and_masks_in_place(tmp_path):
    """A white picture of half the cell's size, one box and one mask: their colours are where they lie."""
    import numpy as np

    Image.new("RGB", (208, 104), "white").save(tmp_path / "a.png")
    inside = np.zeros((104, 208), dtype=bool)
    inside[50:100, 100:200] = True
    regions = [
        Region(box_xyxy=(10, 20, 60, 90), texts=["a phrase"]),
        Region(box_xyxy=(100, 50, 200, 100), mask=Mask(**encode_mask(inside))),
    ]
    write_records(tmp_path / "a.jsonl", [Record(image="a.png", width=208, height=104, regions=regions)])
    assert preview_page(tmp_path / "a.jsonl", tmp_path / "page.png") == 1
    page = np.asarray(Image.open(tmp_path / "page.png")).astype(int)
    assert (page[150:170, 70:110] == 255).all()  # inside of the first box: white
    assert (np.abs(page[100, 19:23] - (255, 0, 200)).sum(axis=-1) < 60).any()  # its left edge, at x = 20
    filled = page[150, 300]
    assert filled[0] < 200 and filled[2] > 240  # bluish
    with pytest.raises(UserError, match=r"labels\.json"):
        preview_page(tmp_path, tmp_path / "other.png")
