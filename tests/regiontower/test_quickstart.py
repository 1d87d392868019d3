"""The main job, small: the same code with fewer scenes and seconds of training."""

import json

import pytest
from typer.testing import CliRunner

from regiontower import quickstart
from regiontower.cli import app
from regiontower.mllm import load_mllm
from regiontower.train_stages.recipe import read_yaml
from regiontower.vision_towers import UserError


def test_quickstart_goes_all_the_way_and_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    pytest.importorskip(
        "lmms_eval", exc_type=ImportError, reason="evaluation needs lmms-eval (pip install 'regiontower[eval]')"
    )
    for name, value in {"MIN_SCENES": 24, "EVAL_SCENES": 4, "EVAL_LIMIT": 4, "GALLERY": 2}.items():
        monkeypatch.setattr(quickstart, name, value)
    out = tmp_path / "quick start"
    results = quickstart.quickstart(out, minutes=0.02)
    assert results == json.loads((out / "report" / "results.json").read_text())
    assert set(results) == {"nano", "control", "trained_now", "seconds"}
    for name in ("nano", "control", "trained_now"):
        figures = results[name]
        assert set(figures) == {"grounding_acc50", "grounding_miou", "referring_em", "reading_em", "n"}
        assert figures["n"] >= 3 and all(0 <= figures[key] <= 1 for key in figures if key != "n")
    page = (out / "report" / "index.html").read_text()
    assert "Where is" in page and page.count("<img") >= 2 + 3 * 2  # two loss curves, and pictures of the tasks
    assert all(f"<td>{who}</td>" in page for who in ("nano", "control", "trained now", "whole image"))
    progress = capsys.readouterr().err
    assert all(f"[{step}/8]" in progress for step in range(1, 9)) and "min left" in progress

    model, _ = load_mllm(out / "runs" / "instruct")
    again = quickstart.quickstart(out, minutes=0.02)  # stages are finished: only evaluation is done again
    assert "nothing to do" in capsys.readouterr().err
    assert {**again, "seconds": 0} == {**results, "seconds": 0}
    reloaded, _ = load_mllm(out / "runs" / "instruct")
    assert all((a == b).all() for a, b in zip(model.parameters(), reloaded.parameters(), strict=True))

    def minutes_of(stage):
        return read_yaml(out / "runs" / stage / "recipe.yaml")["train"]["minutes"]

    before = minutes_of("align"), minutes_of("instruct")
    with pytest.raises(UserError, match="use --overwrite"):
        quickstart.quickstart(out, minutes=0.04)
    assert (minutes_of("align"), minutes_of("instruct")) == before

    class Trained(Exception):
        """Both stages are behind us."""

    def no_evaluation(*_, **__):
        raise Trained

    monkeypatch.setattr("regiontower.eval.run.evaluate", no_evaluation)
    with pytest.raises(Trained):
        quickstart.quickstart(out, minutes=0.04, overwrite=True)
    assert (minutes_of("align"), minutes_of("instruct")) == (0.006, 0.034)
    load_mllm(out / "runs" / "instruct")


def test_the_command_hands_its_options_on_and_prints_a_table(tmp_path, monkeypatch):
    asked = {}
    figures = {"grounding_acc50": 0.6234, "grounding_miou": 0.5186, "referring_em": 1.0, "reading_em": 0.0, "n": 300}
    results = {"nano": figures, "control": figures, "trained_now": {**figures, "reading_em": 0.00667}, "seconds": 440.1}

    def remember(out, **options):
        asked.update(options)
        return results

    monkeypatch.setattr(quickstart, "quickstart", remember)
    command = ["quickstart", "--out", str(tmp_path), "--minutes", "2"]
    lines = CliRunner().invoke(app, [*command, "--overwrite"]).output.splitlines()
    assert asked == {"minutes": 2.0, "overwrite": True}
    assert lines[0].split() == ["per", "cent", "referring", "reading", "grounding", "mean", "IoU"]
    assert [line.split() for line in lines[1:4]] == [
        ["nano", "100.0", "0.0", "62.3", "51.9"],
        ["control", "100.0", "0.0", "62.3", "51.9"],
        ["trained_now", "100.0", "0.7", "62.3", "51.9"],
    ]
    assert len({len(line) for line in lines[:4]}) == 1  # columns stand under their names
    assert lines[-1] == f"report: {tmp_path / 'report' / 'index.html'}"

    printed = CliRunner().invoke(app, [*command, "--json"]).output.splitlines()
    assert asked["overwrite"] is False and [json.loads(line) for line in printed] == [results]


def test_a_file_in_the_way_is_one_sentence(tmp_path):
    pytest.importorskip("lmms_eval", exc_type=ImportError, reason="the check for lmms-eval comes first")
    (tmp_path / "out").write_text("")
    with pytest.raises(UserError, match="is a file"):
        quickstart.quickstart(tmp_path / "out")
