"""The benchmark of the evaluation, small."""

import json

import pytest

pytest.importorskip(
    "lmms_eval", exc_type=ImportError, reason="lmms-eval is not installed (pip install 'regiontower[bench]')"
)
pytest.importorskip("decord", reason="lmms-eval's video extra is not installed (pip install 'regiontower[bench]')")

from regiontower.benchmarks import eval as bench
from regiontower.vision_towers import UserError


def test_both_classes_give_the_same_answers_and_the_last_line_compares_them(monkeypatch, capsys):
    sizes = ["--tiny", "--images", "6", "--questions", "18", "--new-tokens", "5", "--batch-size", "4", "--rounds", "3"]
    monkeypatch.setattr("sys.argv", ["eval", *sizes, "--json"])
    bench.main()
    output = capsys.readouterr()
    last = json.loads(output.out.strip().splitlines()[-1])
    assert set(last) == {"ours_over_llava_hf", "ours_batch1_over_llava_hf", "identical"}
    assert last["identical"] == 1.0 and last["ours_over_llava_hf"] > 0
    report = json.loads(output.err[output.err.index("{\n") :])
    assert report["empty"] == 0 and report["questions"] == 18 and len(report["rounds"]) == 3
    assert report["different_answers"] > 9  # pictures and words matter, or being the same would say nothing


def test_a_difference_and_an_empty_answer_are_counted():
    rounds = [{"ours": 1.0, "ours_batch1": 2.0, "llava_hf": 3.0}, {"ours": 1.0, "ours_batch1": 2.0, "llava_hf": 5.0}]
    answers = {"ours": ["a", "b ", "c"], "ours_batch1": ["a", "b", "c"], "llava_hf": ["a", "b", ""]}
    found = bench.summarise(rounds, answers)
    assert found["ours_over_llava_hf"] == 4.0 and found["ours_batch1_over_llava_hf"] == 2.0
    assert found["identical"] == pytest.approx(2 / 3, abs=1e-3) and found["empty"] == 1
    assert found["ratio_by_round"] == [3.0, 5.0]


def test_different_answers_are_no_result(monkeypatch):
    found = {"ours_over_llava_hf": 9.0, "ours_batch1_over_llava_hf": 4.0, "identical": 0.98, "empty": 0}
    monkeypatch.setattr(bench, "summarise", lambda rounds, answers: dict(found))
    monkeypatch.setattr(bench, "run_rounds", lambda *about: ([], {}))
    monkeypatch.setattr("sys.argv", ["eval", "--tiny", "--images", "1", "--questions", "1", "--rounds", "1"])
    with pytest.raises(SystemExit, match=r"98\.0%"):
        bench.main()


def test_numbers_that_do_not_divide():
    with pytest.raises(UserError, match="must divide"):
        bench.make_rows(4, 10, 2)
