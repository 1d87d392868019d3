"""What the options of `regiontower eval` allow, and the whole way through the command."""

import json

import pytest

from regiontower.eval.command import EvalChoices, run_eval
from regiontower.vision_towers.errors import UserError


@pytest.mark.parametrize(
    ("models", "options", "says"),
    [
        (["a"], {}, "give one file with --data .there are 0"),
        (["a"], {"data": ("x", "y")}, "give one file with --data .there are 2"),
        (["a"], {"suite": "groundin"}, "there is no suite 'groundin'; choose from grounding, ocr, general"),
        (["a", "b"], {"suite": "grounding"}, "--compare asks them all"),
        (["a", "b"], {"suite": "ocr", "compare": True}, "--compare asks the suite grounding"),
        (["a"], {"suite": "ocr", "data": ("x",)}, "give their folder with --data-root"),
        (["a"], {"data": ("x",), "convention": "llava15"}, "name it with --through"),
        (["a"], {"suite": "grounding", "judge": "http://x"}, "--judge-model NAME go together"),
        (["a"], {"data": ("x",), "judge": "http://x", "judge_model": "m"}, "which is in --suite grounding"),
    ],
)
def test_options_that_do_not_go_together_get_one_sentence(tmp_path, models, options, says):
    with pytest.raises(UserError, match=says) as error:
        run_eval(models, EvalChoices(tmp_path, **options))
    assert "\n" not in str(error.value)


@pytest.fixture
def command():
    pytest.importorskip(
        "lmms_eval", exc_type=ImportError, reason="lmms-eval is not installed (pip install 'regiontower[eval]')"
    )
    from typer.testing import CliRunner

    from regiontower.cli import app

    def run(*arguments):
        result = CliRunner().invoke(app, ["eval", *map(str, arguments), "--json"])
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout.splitlines()[-1])

    return run


def test_the_suite_by_one_command(command, tiny_mllm_dir, make_records, tmp_path):
    root = tmp_path / "root"
    for name in ("one", "two"):
        path = make_records(root / name, images=2)
        path.rename(path.with_name("val.jsonl"))
    found = command(tiny_mllm_dir, "--suite", "grounding", "--data-root", root, "--out", tmp_path / "out", "--limit", 2)
    assert found["tasks"]["one/regiontower_grounding"]["n"] == found["tasks"]["two/regiontower_reading"]["n"] == 2
    assert "lichengunc/refer" in found["skipped"]["refcoco"]
    assert (tmp_path / "out/report.html").is_file() and (tmp_path / "out/results.json").is_file()


def test_several_models_by_one_command(command, tiny_mllm_dir, records_path, tmp_path):
    arguments = ["--data", records_path, "--tasks", "grounding", "--limit", 2, "--out", tmp_path / "out"]
    found = command("--compare", tiny_mllm_dir, tiny_mllm_dir, *arguments)
    first, second = found["tasks"]
    changes = found["differences"][second]["some data/regiontower_grounding"]
    assert {metric: change["difference"] for metric, change in changes.items()} == dict.fromkeys(changes, 0.0)
    assert found["base"] == first and found["cost"][first]["image_tokens"] == 64
