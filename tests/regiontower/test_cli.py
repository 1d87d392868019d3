"""The command as a user types it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from regiontower.ask import parse_boxes
from regiontower.cli import app
from regiontower.vision_towers import UserError

COMMANDS = (
    "quickstart",
    "scenes",
    "towers",
    "pretrain",
    "pretrain-lm",
    "align",
    "instruct",
    "eval",
    "lmms-tasks",
    "chat",
    "bench",
)


def run(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "regiontower", *map(str, arguments)], capture_output=True, text=True, timeout=250
    )


@pytest.fixture(scope="module")
def picture(tmp_path_factory, noise_image):
    path = tmp_path_factory.mktemp("my pictures") / "a photo.png"
    noise_image(120, 90).save(path)
    return path


def test_help_names_every_command_and_imports_no_torch():
    code = "import sys; from regiontower.cli import app; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
    help_text = CliRunner().invoke(app, ["--help"]).output
    assert all(command in help_text for command in COMMANDS)


def test_scenes_writes_records_and_reports_json(tmp_path):
    done = run("scenes", tmp_path / "out", "--count", 2, "--seed", 5, "--preset", "easy", "--json")
    assert done.returncode == 0, done.stderr
    last = json.loads(done.stdout.strip().splitlines()[-1])
    assert last["count"] == 2 and len(Path(last["records"]).read_text().splitlines()) == 2


def test_towers_lists_the_registered_types():
    result = CliRunner().invoke(app, ["towers", "--json"])
    rows = {row["type"]: row for row in json.loads(result.output.strip().splitlines()[-1])["towers"]}
    assert (
        rows["rice_vision_model"]["region_readout"] == "rice" and rows["siglip_vision_model"]["num_prefix_tokens"] == 0
    )
    assert "rice_vision_model" in CliRunner().invoke(app, ["towers"]).output


def test_chat_answers_and_draws(tiny_mllm_dir, picture, tmp_path):
    out = tmp_path / "drawn.png"
    done = run(
        "chat", picture, "What is in", "--box", "10,10,50,50", "--model", tiny_mllm_dir, "--max-new-tokens", 5,
        "--out", out, "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout.strip().splitlines()[-1])
    assert set(answer) == {"answer", "boxes", "status"}
    drawn = Image.open(out)
    assert drawn.size == (120, 90) and drawn.getpixel((10, 30)) == (255, 0, 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("chat", "no-such.png", "?", "--model", "x"), "no-such.png"),
        (("align", "no-such-recipe", "--out", "x"), "no-such-recipe"),
        (("align", "align-nano", "--out", "x", "--set", "model.towr=a"), "did you mean model.tower?"),
        (("scenes", "x", "--preset", "hard"), "hard"),
        (("bench", "no-such"), "no-such"),
        (("scenes", "x", "--seed", "999999", "--count", "5"), "1,000,000"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_a_users_mistake_is_one_line_and_a_status(arguments, message, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "regiontower", *arguments], capture_output=True, text=True, cwd=tmp_path, timeout=250
    )
    assert done.returncode == 1
    lines = done.stderr.strip().splitlines()
    assert lines[-1].startswith("regiontower: ") and message in lines[-1] and "Traceback" not in done.stderr


def test_a_model_that_is_none_is_one_line(picture, tmp_path):
    (tmp_path / "empty").mkdir()
    done = run("chat", picture, "?", "--model", tmp_path / "empty")
    assert done.returncode == 1 and "Traceback" not in done.stderr and "empty" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("text", ["1,2,3", "a,b,c,d", "50,10,20,60", "0,0,500,50", "nan,0,5,5", "-1,0,5,5"])
def test_bad_boxes_are_refused(text):
    with pytest.raises(UserError, match="--box"):
        parse_boxes([text], (120, 90))
