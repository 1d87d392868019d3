"""End to end through lmms-eval's API, with a model whose answers are known."""

import json
import os
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip(
    "lmms_eval", exc_type=ImportError, reason="lmms-eval is not installed (pip install 'regiontower[eval]')"
)

from regiontower.eval.run import evaluate
from regiontower.mllm import Answer
from regiontower.mllm.boxes import Boxes, ImageFrame, box_format
from regiontower.vision_towers.errors import UserError


def without_intervals(tasks: dict) -> dict:
    return {name: {key: value for key, value in figures.items() if key != "ci95"} for name, figures in tasks.items()}


def test_known_answers_give_known_figures(records_path, make_chat, expected, tmp_path):
    chat, known = make_chat(batch_size=4)
    result = evaluate(chat, records_path, out=tmp_path / "out folder")
    assert without_intervals(result.tasks) == {
        name: {key: pytest.approx(value) for key, value in figures.items()} for name, figures in expected.items()
    }
    for figures in result.tasks.values():
        for metric, (low, high) in figures["ci95"].items():
            assert 0.0 <= low <= figures[metric] <= high <= 1.0 and low < high
    assert len(known.asked) == len(set(known.asked)) == 27
    # Questions about one image go together: 6 or 7 of its 27 fill a batch of 4 before the next image begins.
    pictures = [number for number, *_ in known.asked]
    assert pictures == sorted(pictures)
    assert set(known.batches) == {4, 3}


def test_the_files_of_a_run(records_path, make_chat, tmp_path):
    out = tmp_path / "out"
    result = evaluate(make_chat()[0], records_path, out=out)
    written = json.loads((out / "results.json").read_text())
    assert written == result.results
    assert written["versions"]["lmms-eval"].startswith("0.7")
    assert written["box_format"] == {"model": "int1000", "scored": "int1000"}
    assert len(written["weights_sha256"]) == len(written["data"]["sha256"]) == 64
    assert written["data"]["records"] == 4 and written["data"]["bad_records"] == []
    assert written["seconds"] > 0
    rows = [json.loads(line) for line in (out / "samples_regiontower_grounding.jsonl").read_text().splitlines()]
    assert rows == result.samples["regiontower_grounding"]
    assert [row["doc_id"] for row in rows] == list(range(12))
    assert rows[11]["question"] == "Where is the blue box?"
    assert rows[11]["answer"] == "[600, 250, 750, 875]"
    assert rows[11]["target"] == [60.0, 20.0, 90.0, 70.0]
    assert rows[11]["predicted_xyxy"] == pytest.approx([60.0, 20.0, 75.0, 70.0])
    assert rows[11]["iou"] == pytest.approx(0.5)
    assert rows[11]["correct"] is True
    assert rows[5] | {"image": ""} == rows[5] | {"image": "", "status": "none", "predicted_xyxy": None, "iou": 0.0}
    assert rows[8]["status"] == "malformed"
    referring = result.samples["regiontower_referring"]
    assert [row["correct"] for row in referring] == [True, True, True, True, False, False, False, False]
    assert referring[0]["target"] == ["the red box", "the left one"]
    assert referring[0]["prompt_boxes"] == [[10.0, 10.0, 50.0, 40.0]]


def test_a_cut_off_run_asks_only_what_is_missing(records_path, make_chat, tmp_path):
    straight = evaluate(make_chat(batch_size=4)[0], records_path, out=tmp_path / "straight")
    out = tmp_path / "resumed"
    chat, first = make_chat(batch_size=4, fail_after=10)
    with pytest.raises(RuntimeError, match="the power went out"):
        evaluate(chat, records_path, out=out)
    assert len(first.asked) == 8  # two whole batches
    assert not (out / "results.json").exists()
    with (out / "responses.jsonl").open("a") as file:
        file.write('{"key": "half a li')

    chat, second = make_chat(batch_size=4)
    resumed = evaluate(chat, records_path, out=out)
    assert len(second.asked) == 19
    assert set(first.asked).isdisjoint(second.asked)
    assert resumed.tasks == straight.tasks
    assert resumed.samples == straight.samples


def test_answers_of_other_weights_are_not_reused(records_path, make_chat, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(RuntimeError):
        evaluate(make_chat(batch_size=4, fail_after=10)[0], records_path, out=out)
    chat, known = make_chat(batch_size=4, weight=1.5)
    evaluate(chat, records_path, out=out)
    assert len(known.asked) == 27


def test_a_finished_run_is_done_again(records_path, make_chat, tmp_path):
    out = tmp_path / "out"
    first = evaluate(make_chat()[0], records_path, out=out)
    chat, known = make_chat(fail_after=0)
    with pytest.raises(RuntimeError):
        evaluate(chat, records_path, out=out)
    assert not (out / "results.json").exists()  # the old figures do not outlive the crash
    chat, known = make_chat()
    assert evaluate(chat, records_path, out=out).tasks == first.tasks
    assert len(known.asked) == 27


def test_the_process_is_left_as_it_was(records_path, make_chat, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "0")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.delenv("LMMS_EVAL_DATASETS_CACHE", raising=False)
    monkeypatch.chdir(tmp_path)
    chat, _ = make_chat()
    chat.model.train()
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    wanted = random.random(), np.random.random(), torch.rand(1).item()
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    before = dict(os.environ)
    evaluate(chat, records_path, tasks=["regiontower_reading"], out="out")
    assert (random.random(), np.random.random(), torch.rand(1).item()) == wanted
    assert dict(os.environ) == before
    assert chat.model.training
    assert chat.model.weight.requires_grad  # clean() has not deleted the model either
    assert sorted(path.name for path in Path().iterdir()) == ["out", "some data"]


def test_a_task_without_rows_has_no_figure(make_records, make_chat, tmp_path):
    path = make_records(tmp_path / "no ocr", with_ocr=False)
    result = evaluate(make_chat()[0], path, out=tmp_path / "out")
    assert result.tasks["regiontower_reading"] == {"n": 0, "em": None, "ci95": None}
    assert result.tasks["regiontower_grounding"]["n"] == 12
    assert (tmp_path / "out/samples_regiontower_reading.jsonl").read_text() == ""
    with pytest.raises(UserError, match="no row for regiontower_reading"):
        evaluate(make_chat()[0], path, tasks=["regiontower_reading"], out=tmp_path / "out")


def test_a_limit_and_a_choice_of_tasks(records_path, make_chat, tmp_path):
    chat, known = make_chat()
    result = evaluate(chat, records_path, tasks=["regiontower_grounding"], out=tmp_path / "out", limit=4)
    assert {name: figures["n"] for name, figures in result.tasks.items()} == {"regiontower_grounding": 4}
    assert sorted(number for number, *_ in known.asked) == [0, 1, 2, 3]


def test_a_model_of_another_convention_is_restated(records_path, make_chat, tmp_path):
    """Its boxes lie in the padded square of norm01, which the scorer knows nothing of."""

    def answer(model, processor, questions, **_):
        own, frame = box_format("norm01"), ImageFrame.letterbox((100, 80), 224)
        texts = [own.write(Boxes([[10.0, 10.0, 50.0, 40.0]]), frame) for _ in questions]
        for position, question in enumerate(questions):
            if question.text == "Where is the blue box?" and question.image.getpixel((0, 0))[0] == 3:  # the last row
                texts[position] = "[100, 125, 500, 500]"  # a box in int1000, nonsense in its own convention
        return [Answer(text, own.parse(text, frame)) for text in texts]

    chat, _ = make_chat(answer=answer, box_format="norm01")
    result = evaluate(chat, records_path, tasks=["regiontower_grounding"], out=tmp_path / "out")
    rows = result.samples["regiontower_grounding"]
    assert rows[0]["answer"] == "[100, 125, 500, 500]"
    assert rows[0]["iou"] == pytest.approx(1.0)
    assert rows[-1]["status"] == "malformed"
    assert result.tasks["regiontower_grounding"]["acc50"] == pytest.approx(8 / 12)
    log = [json.loads(line) for line in (tmp_path / "out/responses.jsonl").read_text().splitlines()]
    assert log[0]["answer"] == "[0.10, 0.20, 0.50, 0.50]"  # as the model wrote it


def test_lmms_eval_reports_the_same_figures(records_path, make_chat, expected, isolated_cache):
    from lmms_eval import evaluator
    from lmms_eval.tasks import TaskManager

    from regiontower.eval.task_folder import task_folder

    folder = task_folder(records_path)
    manager = TaskManager("ERROR", include_path=str(folder), include_defaults=False, model_name="regiontower")
    results = evaluator.simple_evaluate(
        model=make_chat()[0], tasks=list(expected), task_manager=manager, bootstrap_iters=0, verbosity="ERROR"
    )["results"]
    for name, figures in expected.items():
        for metric in set(figures) - {"n"}:
            assert results[name][f"{metric},none"] == pytest.approx(figures[metric])
    assert results["regiontower_grounding"]["miou_stderr_clustered,none"] > 0  # lmms-eval knows the images too


def test_several_processes_are_sent_to_torchrun(records_path, make_chat, tmp_path, monkeypatch):
    chat, _ = make_chat()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="torchrun"):
        evaluate(chat, records_path, out=tmp_path / "out")


def test_without_lmms_eval_the_user_is_told_what_to_install(records_path, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lmms_eval", None)  # importing it raises ImportError
    with pytest.raises(UserError, match=r"pip install 'regiontower\[eval\]'"):
        evaluate("anything", records_path, out=tmp_path / "out")
