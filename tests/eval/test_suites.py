"""Every built-in task of the suites, offline, on four rows with the columns that the hub's files have."""

import json
import shutil
from types import SimpleNamespace

import pytest

pytest.importorskip(
    "lmms_eval", exc_type=ImportError, reason="lmms-eval is not installed (pip install 'regiontower[eval]')"
)

from datasets import Dataset, Features, Image, List, Value

from regiontower.eval.lmms_model import RegionTowerChat
from regiontower.eval.opened import Opening
from regiontower.eval.suite_data import find_data
from regiontower.eval.suite_run import evaluate_suite
from regiontower.eval.suites import BUILT_INS, SUITES, suite_tasks
from regiontower.vision_towers.errors import UserError

# name -> folders and file of the hub's repository, and the columns beside `image`, four rows each
HUB = {
    "docvqa": (
        "DocVQA/validation-00000-of-00001.parquet",
        {
            "questionId": ["1", "2", "3", "4"],
            "question": [f"What is on page {n}?" for n in range(4)],
            "question_types": [["handwritten"]] * 4,
            "docId": [7, 7, 8, 9],
            "ucsf_document_id": ["a"] * 4,
            "ucsf_document_page_no": ["1"] * 4,
            "answers": [["alpha"], ["beta", "betas"], ["gamma"], ["delta"]],
            "data_split": ["val"] * 4,
        },
        ["alpha", "betas", "gammb", "nothing"],
    ),
    "infovqa": (
        "InfographicVQA/validation-00000-of-00001.parquet",
        {
            "questionId": ["1", "2", "3", "4"],
            "question": [f"What is in figure {n}?" for n in range(4)],
            "answers": [["12"], ["34"], ["56%"], ["seven"]],
            "answer_type": [["single span"]] * 4,
            "image_url": ["u"] * 4,
            "operation/reasoning": [["none"]] * 4,
            "ocr": ["{}"] * 4,
            "data_split": ["val"] * 4,
        },
        ["12", "34", "56%", "no"],
    ),
    "textvqa": (
        "data/validation-00000-of-00001.parquet",
        {
            "image_id": list("abcd"),
            "question_id": [1, 2, 3, 4],
            "question": [f"which brand is number {n}?" for n in range(4)],
            "question_tokens": [["which"]] * 4,
            "image_width": [40] * 4,
            "image_height": [30] * 4,
            "flickr_original_url": ["u"] * 4,
            "flickr_300k_url": ["u"] * 4,
            "answers": [["nokia"] * 10, ["sony"] * 10, ["dell"] * 10, ["asus"] * 10],
            "image_classes": [["Phone"]] * 4,
            "set_name": ["val"] * 4,
            "ocr_tokens": [["NOKIA"]] * 4,
        },
        ["Nokia", "sony.", "hp", "hp"],
    ),
    "chartqa": (
        "data/test-00000-of-00001.parquet",
        {
            "type": ["human_test", "human_test", "augmented_test", "augmented_test"],
            "question": [f"How much is bar {n}?" for n in range(4)],
            "answer": ["100", "Yes", "14.2", "France"],
        },
        ["104", "no", "14", "france"],
    ),
    "ocrbench": (
        "data/test-00000-of-00001.parquet",
        {
            "dataset": ["IIIT5K", "SVT", "HME100k", "docVQA"],
            "question": [f"what is written in the image {n}?" for n in range(4)],
            "question_type": [
                "Regular Text Recognition",
                "Regular Text Recognition",
                "Handwritten Mathematical Expression Recognition",
                "Doc-oriented VQA",
            ],
            "answer": [["PRIVATE"], ["bar"], ["x = 1"], ["12", "twelve"]],
        },
        ["it says private", "foo", "x=1", "twelve"],
    ),
    "ai2d": (
        "data/test-00000-of-00001.parquet",
        {
            "question": [f"What does letter {n} stand for?" for n in range(4)],
            "options": [["stem", "leaf", "root", "seed"]] * 4,
            "answer": ["0", "1", "2", "3"],
        },
        ["A", "B. leaf", "D", "D"],
    ),
    "mme": (
        "data/test-00000-of-00002-a1b2c3.parquet",
        {
            "question_id": ["existence/1.png", "existence/1.png", "OCR/2.png", "OCR/2.png"],
            "question": [f"Is there a {thing}? Please answer yes or no." for thing in ("cat", "dog", "sign", "logo")],
            "answer": ["Yes", "No", "Yes", "No"],
            "category": ["existence", "existence", "OCR", "OCR"],
        },
        ["Yes", "No", "Yes", "Yes"],
    ),
    "pope": (
        "data/test-00000-of-00003.parquet",
        {
            "id": list("0123"),
            "question_id": list("1234"),
            "question": [f"Is there a {thing} in the image?" for thing in ("car", "cup", "pen", "hat")],
            "answer": ["yes", "no", "yes", "no"],
            "image_source": ["COCO_val2014_1"] * 4,
            "category": ["adversarial"] * 4,
        },
        ["yes", "yes", "yes", "no"],
    ),
    "mmbench": (
        "en/dev-00000-of-00001.parquet",
        {
            "index": [1, 2, 3, 4],
            "question": [f"Which one is it, number {n}?" for n in range(4)],
            "hint": ["nan", "Look twice.", "nan", "nan"],
            "answer": ["A", "B", "A", "B"],
            **{letter: [f"{letter} {n}" for n in range(4)] for letter in "AB"},
            **{letter: ["nan"] * 4 for letter in "CD"},
            "category": ["color"] * 4,
            "source": ["s"] * 4,
            "L2-category": ["perception"] * 4,
            "comment": ["nan"] * 4,
            "split": ["dev"] * 4,
        },
        ["A", "The answer is B.", "B", "B"],
    ),
    "realworldqa": (
        "data/test-00000-of-00002.parquet",
        {
            "image_path": ["x.png"] * 4,
            "question": [f"Which way is {n}? A. Left B. Right Please answer directly." for n in range(4)],
            "answer": ["A", "B", "2", "Downhill"],
        },
        ["A", "A", "2", "downhill."],
    ),
    "mmstar": (
        "mmstar.parquet",
        {
            "index": [0, 1, 2, 3],
            "question": [f"Which scene is {n}? Options: A: sea, B: town, C: wood, D: desert" for n in range(4)],
            "answer": ["A", "B", "C", "D"],
            "category": ["coarse perception", "coarse perception", "math", "math"],
            "l2_category": ["image emotion", "image scene and topic", "geometry", "geometry"],
            "meta_info": ["{}"] * 4,
        },
        ["A", "C", "C", "D"],
    ),
}
# what the answers above are worth, counted by hand from each benchmark's rule
FIGURES = {
    "docvqa": {"anls": (1 + 1 + 0.8 + 0) / 4},
    "infovqa": {"anls": 3 / 4},
    "textvqa": {"exact_match": 2 / 4},
    "chartqa": {"relaxed_overall": 3 / 4, "relaxed_human_split": 1 / 2, "relaxed_augmented_split": 1.0},
    "ocrbench": {"ocrbench_accuracy": 3 / 4},
    "ai2d": {"exact_match": 3 / 4},
    "mme": {"mme_perception_score": 200.0 + 50.0, "mme_cognition_score": None},
    "pope": {
        "pope_accuracy": 3 / 4,
        "pope_precision": 2 / 3,
        "pope_recall": 1.0,
        "pope_f1_score": 0.8,
        "pope_yes_ratio": 1 / 2,
    },
    "mmbench": {"gpt_eval_score": 75.0},
    "realworldqa": {"exact_match": 3 / 4},
    "mmstar": {
        "coarse perception": 1 / 2,
        "fine-grained perception": None,
        "instance reasoning": None,
        "logical reasoning": None,
        "science & technology": None,
        "math": 1.0,
        "average": 2 / 3,  # of three kinds of question: 1, 0 and 1
    },
}


def column(values):
    if isinstance(values[0], list):
        return List(Value("string"))
    return Value("int64" if isinstance(values[0], int) else "string")


@pytest.fixture(scope="module")
def data_root(tmp_path_factory, noise_image):
    root = tmp_path_factory.mktemp("data root")
    for name, (file, columns, _) in HUB.items():
        path = root / name / file
        path.parent.mkdir(parents=True)
        features = Features({key: column(values) for key, values in columns.items()} | {"image": Image()})
        # MME asks twice about a picture, DocVQA now and then.
        seeds = [0, 0, 1, 1] if name in ("mme", "docvqa") else range(4)
        rows = {**columns, "image": [noise_image(40, 30, seed) for seed in seeds]}
        Dataset.from_dict(rows, features=features).to_parquet(str(path))
    return root


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


def test_without_the_hub_the_user_is_told_what_is_missing(data_root, monkeypatch, tmp_path):
    import datasets
    import huggingface_hub

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "empty")
    monkeypatch.delenv("REGIONTOWER_DATA", raising=False)
    with pytest.raises(UserError) as error:
        find_data(suite_tasks("ocr"))
    message = str(error.value)
    assert message.startswith("no data for docvqa, textvqa, infovqa, chartqa, ocrbench on this machine")
    assert "lmms-lab-encoder/DocVQA/InfographicVQA (validation) -> DIR/infovqa" in message
    assert "--data-root DIR" in message and "REGIONTOWER_DATA=DIR" in message and "\n" not in message
    # Only one of them is missing, and the root comes from the environment.
    shutil.copytree(data_root, tmp_path / "root")
    shutil.rmtree(tmp_path / "root/chartqa")
    monkeypatch.setenv("REGIONTOWER_DATA", str(tmp_path / "root"))
    with pytest.raises(UserError, match=r"^no data for chartqa in .*root, and the hub"):
        find_data(suite_tasks("ocr"))
    found = find_data(suite_tasks("ocr", ["docvqa", "infovqa"]))
    assert [data.files[0].parent.name for data in found] == ["DocVQA", "InfographicVQA"]


@pytest.mark.parametrize(
    ("break_it", "says"),
    [
        (lambda path: path.write_text("no parquet"), "is not a parquet file"),
        (lambda path: path.unlink(), "holds no parquet file"),
    ],
)
def test_unusable_files_are_named(data_root, tmp_path, break_it, says):
    shutil.copytree(data_root / "ai2d", tmp_path / "root/ai2d")
    break_it(tmp_path / "root/ai2d" / HUB["ai2d"][0])
    with pytest.raises(UserError, match=says):
        find_data(suite_tasks("general", ["ai2d"]), tmp_path / "root")


def test_other_columns_and_lone_rows_are_named_before_anything_is_asked(data_root, tmp_path):
    (tmp_path / "root").mkdir()
    shutil.copytree(data_root / "pope", tmp_path / "root/ai2d")
    with pytest.raises(UserError, match="lacks the columns options, which ai2d reads"):
        find_data(suite_tasks("general", ["ai2d"]), tmp_path / "root")
    rows = Dataset.from_parquet(str(data_root / "mme" / HUB["mme"][0]), cache_dir=str(tmp_path / "cache"))
    (tmp_path / "root/mme").mkdir()
    rows.select([0, 2, 1, 3]).to_parquet(str(tmp_path / "root/mme/test.parquet"))
    with pytest.raises(UserError, match=r"mme scores 2 rows of one question_id together.*existence/1\.png"):
        find_data(suite_tasks("general", ["mme"]), tmp_path / "root")


def test_unknown_names():
    with pytest.raises(UserError, match="choose from ocr, general"):
        suite_tasks("vision")
    with pytest.raises(UserError, match="no task 'pope' in the suite ocr"):
        suite_tasks("ocr", ["pope"])
    assert [task.name for task in suite_tasks("general", ["pope", "mme"])] == ["mme", "pope"]
