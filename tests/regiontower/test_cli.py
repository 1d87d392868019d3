"""The command as a user types it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from regiontower.ask import parse_boxes
from regiontower.cli import app, main
from regiontower.vision_towers import UserError

COMMANDS = (
    "quickstart",
    "scenes",
    "label",
    "towers",
    "pretrain",
    "pretrain-lm",
    "align",
    "instruct",
    "eval",
    "probe",
    "segment",
    "lmms-tasks",
    "chat",
    "export",
    "check",
    "swap",
    "bench",
)


@pytest.fixture
def run(monkeypatch, capsys):
    """`run(*arguments)` -> (status, stdout, stderr) of the command, in this process."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["regiontower", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        return stopped.value.code, *capsys.readouterr()

    return call


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


def test_scenes_writes_records_and_reports_json(run, tmp_path):
    status, output, _ = run("scenes", tmp_path / "out", "--count", 2, "--seed", 5, "--preset", "easy", "--json")
    assert status == 0
    last = json.loads(output.strip().splitlines()[-1])
    assert last["count"] == 2 and len(Path(last["records"]).read_text().splitlines()) == 2


def test_bench_hands_its_options_on(run):
    status, output, _ = run("bench", "nano-answers", "--help")
    assert status == 0 and "PNG to write" in output


def test_towers_lists_the_registered_types():
    result = CliRunner().invoke(app, ["towers", "--json"])
    rows = {row["type"]: row for row in json.loads(result.output.strip().splitlines()[-1])["towers"]}
    assert (
        rows["rice_vision_model"]["region_readout"] == "rice" and rows["siglip_vision_model"]["num_prefix_tokens"] == 0
    )
    assert "rice_vision_model" in CliRunner().invoke(app, ["towers"]).output


def test_chat_answers_and_draws(run, tiny_mllm_dir, picture, tmp_path):
    out = tmp_path / "drawn.png"
    arguments = ("--box", "10,10,50,50", "--model", tiny_mllm_dir, "--max-new-tokens", 5, "--out", out, "--json")
    status, output, _ = run("chat", picture, "What is in", *arguments)
    assert status == 0
    answer = json.loads(output.strip().splitlines()[-1])
    assert set(answer) == {"answer", "boxes", "status"}
    drawn = Image.open(out)
    assert drawn.size == (120, 90) and drawn.getpixel((10, 30)) == (255, 0, 0)


def test_chat_asks_where_something_is_in_the_words_of_training(run, tiny_mllm_dir, picture):
    answers = []
    for question in ("Where is star?", "where is the star", "Find a star!", "Where is a heart?"):
        status, output, _ = run("chat", picture, question, "--model", tiny_mllm_dir, "--max-new-tokens", 8, "--json")
        assert status == 0
        answers.append(json.loads(output.strip().splitlines()[-1])["answer"])
    assert answers[0] == answers[1] == answers[2] != answers[3]


def test_eval_ends_with_the_figures_of_each_task(run, tiny_mllm_dir, tmp_path):
    pytest.importorskip(
        "lmms_eval", exc_type=ImportError, reason="evaluation needs lmms-eval (pip install 'regiontower[eval]')"
    )
    run("scenes", tmp_path / "scenes", "--count", 2, "--seed", 1_000_000, "--preset", "easy")
    data = ("--data", tmp_path / "scenes" / "records.jsonl", "--limit", 2)
    every = {"grounding", "referring", "reading", "absent"}
    for tasks, expected in ((), every), (("--tasks", "grounding"), {"grounding"}):
        status, output, errors = run("eval", tiny_mllm_dir, *data, "--out", tmp_path / "out", *tasks, "--json")
        assert status == 0, errors
        figures = json.loads(output.strip().splitlines()[-1])["tasks"]
        assert set(figures) == {f"regiontower_{name}" for name in expected}
        assert {"n", "acc50", "miou", "parse_rate", "ci95"} <= set(figures["regiontower_grounding"])


def test_probe_prints_a_table_or_ends_with_json(run, tiny_mllm_dir, tmp_path):
    run("scenes", tmp_path / "scenes", "--count", 30, "--seed", 3, "--preset", "easy")
    command = ("probe", tiny_mllm_dir, "--data", tmp_path / "scenes" / "records.jsonl")
    status, output, errors = run(*command, "--readout", "own,roi", "--out", tmp_path / "probe", "--json")
    assert status == 0, errors
    figures = json.loads(output.strip().splitlines()[-1])
    assert set(figures["readouts"]) == {"own", "roi"} and figures["readouts"]["roi"]["linear"]["n"] > 0
    assert (tmp_path / "probe" / "similarity.png").stat().st_size > 0
    status, output, _ = run(*command)
    assert status == 0 and "linear" in output and "24 images to learn from, 6 to be tested on" in output
    status, _, errors = run(*command, "--readout", "own,magic")
    assert status == 1 and "choose among own, roi, value, map, crops" in errors.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("chat", "no-such.png", "?", "--model", "x"), "no-such.png"),
        (("align", "no-such-recipe", "--out", "x"), "no-such-recipe"),
        (("align", "align-nano", "--out", "x", "--set", "model.towr=a"), "did you mean model.tower?"),
        (("scenes", "x", "--preset", "hard"), "hard"),
        (("bench", "no-such"), "no-such"),
        (("scenes", "x", "--seed", "999999", "--count", "5"), "evaluation"),
        (("probe", "no/such/tower", "--data", "x.jsonl"), "no/such/tower"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_a_users_mistake_is_one_line_and_a_status(run, arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, _, errors = run(*arguments)
    (line,) = errors.strip().splitlines()
    assert status == 1 and line.startswith("regiontower: ") and message in line


def test_a_model_that_is_none_is_one_line(picture, tmp_path):
    (tmp_path / "empty").mkdir()
    command = [sys.executable, "-m", "regiontower", "chat", picture, "?", "--model", tmp_path / "empty"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert done.returncode == 1 and "Traceback" not in done.stderr and "empty" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("text", ["1,2,3", "a,b,c,d", "50,10,20,60", "0,0,500,50", "nan,0,5,5", "-1,0,5,5"])
def test_bad_boxes_are_refused(text):
    with pytest.raises(UserError, match="--box"):
        parse_boxes([text], (120, 90))
