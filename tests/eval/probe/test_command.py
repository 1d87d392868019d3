"""`regiontower probe`, from its options to its figures."""

import json

import pytest
from typer.testing import CliRunner

from regiontower.cli import app
from regiontower.train_stages.record_io import write_records


@pytest.fixture(scope="module")
def data(square_records):
    records = square_records(20, 9)
    write_records(records.path, records.records)
    return records.path


def run(*arguments):
    return CliRunner().invoke(app, ["probe", *map(str, arguments), "--device", "cpu"])


def test_what_is_trained_is_asked_for_in_steps(rice_tower, tiny_tokenizer, data, tmp_path):
    rice_tower.save_pretrained(tmp_path / "tower")
    tiny_tokenizer.save_pretrained(tmp_path / "tokenizer")
    result = run(
        tmp_path / "tower", "--data", data, "--labels", "tags", "--tokenizer", tmp_path / "tokenizer",
        "--lit-steps", 2, "--detect-steps", 1, "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout.splitlines()[-1])
    assert "lit_zero_shot" in found["readouts"]["own"] and found["detection"]["steps"] == 1


def test_a_protocol_stands_alone(pair, data, tmp_path):
    templates = tmp_path / "templates.txt"
    templates.write_text("a {}\nthe {}\n", encoding="utf-8")
    classes = tmp_path / "classes.txt"
    classes.write_text("square\na circle\n", encoding="utf-8")
    asked = (pair[1], "--data", data, "--protocol", "fgclip-acc")
    result = run(*asked, "--templates", templates, "--classes", classes, "--json", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["classes"] == 2 and found["classes_from"] == str(classes)
    assert found["templates"] == 2 and found["readouts"]["own"]["boxes_top1"]["n"] == 40
    assert (tmp_path / "out" / "fgclip-acc.json").is_file()
    for wrong, sentence in (
        ((*asked, "--lit-steps", 5), "learns nothing"),
        ((*asked, "--labels", "tags"), "takes categories"),
        ((pair[1], "--data", data, "--classes", classes), "candidates of a protocol"),
    ):
        refused = run(*wrong)
        assert refused.exit_code == 1 and sentence in str(refused.exception)


def test_templates_stand_for_the_names_of_a_probe_too(pair, data, tmp_path):
    templates = tmp_path / "templates.txt"
    templates.write_text("a {}\nthe {}\n", encoding="utf-8")
    result = run(pair[1], "--data", data, "--labels", "tags", "--templates", templates, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout.splitlines()[-1])["templates"] == 2
