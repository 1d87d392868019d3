"""Every built-in task of the suites, offline, on four rows with the columns that the hub's files have."""

import json
from types import SimpleNamespace

import pytest

pytest.importorskip(
    "lmms_eval", exc_type=ImportError, reason="lmms-eval is not installed (pip install 'regiontower[eval]')"
)

from suite_rows import FIGURES, HUB

from regiontower.eval.lmms_model import RegionTowerChat
from regiontower.eval.opened import Opening
from regiontower.eval.suite_run import evaluate_suite
from regiontower.eval.suites import BUILT_INS, SUITES, suite_tasks
from regiontower.vision_towers.errors import UserError


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LMMS_EVAL_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def knowing_chat(make_chat):
    """Answers each built-in question as `HUB` says."""
    asked = []

    def answer(model, processor, questions, max_new_tokens, batch_size):
        replies = []
        for question in questions:
            asked.append(question.text)
            found = [
                replies_of[row]
                for _, columns, replies_of in HUB.values()
                for row, text in enumerate(columns["question"])
                if text.replace(" Please answer yes or no.", "").lower() in question.text.lower()
            ]
            assert len(found) == 1, question.text
            replies.append(SimpleNamespace(text=found[0], boxes=None))
        return replies

    chat, _ = make_chat(answer=answer)
    return chat, asked


def test_every_task_has_its_columns_here_and_its_suite():
    assert set(HUB) == set(BUILT_INS) == set(FIGURES) == {name for names in SUITES.values() for name in names}
    for name, (_, columns, _) in HUB.items():
        assert set(BUILT_INS[name].columns) <= {*columns, "image"}
        assert all(len(values) == 4 for values in columns.values())


@pytest.mark.parametrize("suite", SUITES)
def test_known_answers_get_the_figures_of_each_benchmark(suite, data_root, knowing_chat, tmp_path):
    chat, asked = knowing_chat
    result = evaluate_suite(chat, suite, tmp_path / "out", data_root=data_root, how=Opening(progress=False))
    assert result is not None
    for name in SUITES[suite]:
        figures = dict(result.tasks[name])
        intervals = figures.pop("ci95")
        assert figures == {
            "n": 4,
            **{key: None if value is None else pytest.approx(value) for key, value in FIGURES[name].items()},
        }, name
        assert {metric for metric, interval in intervals.items() if interval is not None} == set(BUILT_INS[name].means)
        for metric in BUILT_INS[name].means:
            assert intervals[metric][0] <= figures[metric] <= intervals[metric][1]
        rows = [json.loads(line) for line in (tmp_path / f"out/samples_{name}.jsonl").read_text().splitlines()]
        assert [row["answer"] for row in rows] == [
            # ai2d's own filter takes the letter out of the answer
            reply[:1] if name == "ai2d" else reply
            for reply in HUB[name][2]
        ]
    assert len(asked) == 4 * len(SUITES[suite])
    written = json.loads((tmp_path / "out/results.json").read_text())
    assert written == result.results and written["suite"] == suite
    assert written["versions"]["lmms-eval"].startswith("0.7")
    assert [path.name for path in tmp_path.iterdir() if path.name not in ("out", "datasets")] == []  # no litter


@pytest.mark.parametrize("suite", SUITES)
def test_a_model_answers_every_task(suite, data_root, tiny_mllm, tmp_path):
    # A random model's answers have no end, and MMBench would let it go on for 1024 tokens.
    chat = RegionTowerChat.from_module(*tiny_mllm, batch_size=3, max_new_tokens=6, progress=False)
    result = evaluate_suite(chat, suite, tmp_path / "out", data_root=data_root)
    assert result is not None
    for name in SUITES[suite]:
        assert result.tasks[name]["n"] == len(result.samples[name]) == 4
        assert any(row["answer"] for row in result.samples[name])


def test_a_suite_by_the_command(data_root, tiny_mllm_dir, tmp_path):
    from typer.testing import CliRunner

    from regiontower.cli import app

    options = ["--suite", "ocr", "--tasks", "docvqa,infovqa", "--limit", "2", "--quant", "int8"]
    folders = ["--data-root", str(data_root), "--out", str(tmp_path / "out")]
    ran = CliRunner().invoke(app, ["eval", str(tiny_mllm_dir), *options, *folders, "--json"])
    assert ran.exit_code == 0, ran.output
    found = json.loads(ran.stdout.splitlines()[-1])["tasks"]
    assert {name: figures["n"] for name, figures in found.items()} == {"docvqa": 2, "infovqa": 2}
    written = json.loads((tmp_path / "out/results.json").read_text())
    assert written["tasks"] == found and written["arguments"]["quant"] == "int8"
    page = (tmp_path / "out/report.html").read_text()
    assert ">docvqa<" in page and "anls" in page and "n = 2" in page and written["weights_sha256"] in page
    assert str(data_root / "infovqa" / HUB["infovqa"][0]) in page


def test_a_run_that_was_cut_off_asks_only_what_is_missing_and_ends_with_the_same_numbers(
    data_root, knowing_chat, make_chat, tmp_path
):
    chat, asked = knowing_chat
    names = ["ai2d", "pope"]
    straight = evaluate_suite(chat, "general", tmp_path / "straight", tasks=names, data_root=data_root)
    knows, batches = chat._answer, []

    def dying(model, processor, questions, **how):
        if len(batches) == 2:
            raise RuntimeError("the power went out")
        batches.append(len(questions))
        return knows(model, processor, questions, **how)

    with pytest.raises(RuntimeError, match="power"):
        dies, _ = make_chat(answer=dying, batch_size=2)
        evaluate_suite(dies, "general", tmp_path / "resumed", tasks=names, data_root=data_root)
    assert not (tmp_path / "resumed/results.json").exists()
    log = [json.loads(line) for line in (tmp_path / "resumed/responses.jsonl").read_text().splitlines()]
    first = {(entry["task"], entry["doc_id"]) for entry in log}
    assert len(first) == 4
    asked.clear()
    again, _ = make_chat(answer=knows, batch_size=2)
    resumed = evaluate_suite(again, "general", tmp_path / "resumed", tasks=names, data_root=data_root)
    assert len(asked) == 4
    log = [json.loads(line) for line in (tmp_path / "resumed/responses.jsonl").read_text().splitlines()]
    assert len(log) == len({(entry["task"], entry["doc_id"]) for entry in log}) == 8
    assert straight is not None and resumed is not None
    assert resumed.tasks == straight.tasks and resumed.samples == straight.samples


def test_a_limit_keeps_pairs_together_and_spreads_evenly(data_root, knowing_chat, tmp_path):
    chat, asked = knowing_chat
    result = evaluate_suite(chat, "general", tmp_path / "out", tasks=["mme", "pope"], data_root=data_root, limit=3)
    assert result is not None
    assert {name: figures["n"] for name, figures in result.tasks.items()} == {"mme": 2, "pope": 3}
    assert [row["target"] for row in result.samples["mme"]] == ["Yes", "No"]
    assert sum("car" in text or "cup" in text or "pen" in text for text in asked) == 3
    # One run after the other in one process: nothing is carried over.
    once_more = evaluate_suite(make_again(chat), "general", tmp_path / "more", tasks=["pope"], data_root=data_root)
    assert once_more is not None and once_more.tasks["pope"]["pope_accuracy"] == 3 / 4


def make_again(chat):
    chat.log = None
    return chat


def test_ocrbench_twice_in_one_process(data_root, knowing_chat, tmp_path):
    chat, _ = knowing_chat
    for number in range(2):
        result = evaluate_suite(
            make_again(chat), "ocr", tmp_path / str(number), tasks=["ocrbench"], data_root=data_root
        )
        assert result is not None and result.tasks["ocrbench"]["ocrbench_accuracy"] == 3 / 4


def test_files_of_another_writer(data_root, knowing_chat, tmp_path):
    """Plain structs of bytes, without the note by which `datasets` knows a picture; one file, of any name."""
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(data_root / "pope" / HUB["pope"][0]).replace_schema_metadata(None)
    (tmp_path / "root/pope").mkdir(parents=True)
    pyarrow.parquet.write_table(table, tmp_path / "root/pope/my rows.parquet")
    result = evaluate_suite(knowing_chat[0], "general", tmp_path / "out", tasks=["pope"], data_root=tmp_path / "root")
    assert result is not None and result.tasks["pope"]["pope_accuracy"] == 3 / 4


def test_unknown_names():
    with pytest.raises(UserError, match="choose from ocr, general"):
        suite_tasks("vision")
    with pytest.raises(UserError, match="no task 'pope' in the suite ocr"):
        suite_tasks("ocr", ["pope"])
    assert [task.name for task in suite_tasks("general", ["pope", "mme"])] == ["mme", "pope"]
