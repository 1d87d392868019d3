"""The main job, small: the same code with fewer scenes and seconds of training."""

import json

import pytest

from regiontower import quickstart
from regiontower.mllm import load_mllm
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


def test_a_file_in_the_way_is_one_sentence(tmp_path):
    pytest.importorskip("lmms_eval", exc_type=ImportError, reason="the check for lmms-eval comes first")
    (tmp_path / "out").write_text("")
    with pytest.raises(UserError, match="is a file"):
        quickstart.quickstart(tmp_path / "out")
