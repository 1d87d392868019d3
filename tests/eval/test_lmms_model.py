import json
import multiprocessing
import os
import signal
from importlib.metadata import entry_points
from types import SimpleNamespace

import pytest
from PIL import Image

pytest.importorskip(
    "lmms_eval", exc_type=ImportError, reason="lmms-eval is not installed (pip install 'regiontower[eval]')"
)

from regiontower.eval import lmms_model
from regiontower.eval.lmms_model import RegionTowerChat
from regiontower.eval.lmms_requests import Asked, Pictures
from regiontower.eval.lmms_simple import RegionTowerSimple
from regiontower.eval.task_folder import task_folder
from regiontower.mllm import Question, SharedAnswers
from regiontower.vision_towers.errors import UserError


def request(question="What is this?", *, images=1, doc_id=0, **generation):
    """One request of a task that is not ours."""
    content = [{"type": "image", "url": Image.new("RGB", (8, 8), (doc_id, 0, 0))} for _ in range(images)]
    messages = [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]
    return SimpleNamespace(args=(question, lambda doc: messages, generation, doc_id, "other", "test"))


@pytest.fixture
def chat(make_chat):
    def answer(model, processor, questions, max_new_tokens, batch_size):
        return [
            SimpleNamespace(text=f"{question.text} {max_new_tokens} stop here", boxes=None) for question in questions
        ]

    def make(**options):
        chat, _ = make_chat(answer=answer, **options)
        chat.task_dict["other"] = {"test": [{}, {}, {}]}
        return chat

    return make


def test_the_entry_point_is_found():
    from lmms_eval.models import get_model

    (found,) = entry_points(group="lmms_eval.models", name="regiontower")
    assert found.value == "regiontower.eval.lmms_plugin:manifests"
    assert get_model("regiontower") is RegionTowerChat
    assert get_model("regiontower", force_simple=True) is RegionTowerSimple


def test_tasks_of_others_are_answered(chat):
    answers = chat().generate_until([request("b", doc_id=1), request("a", doc_id=0), request("b", doc_id=1)])
    assert answers == ["b 48 stop here", "a 48 stop here", "b 48 stop here"]


def test_what_a_task_says_of_generation(chat):
    requests = [request("x", max_new_tokens=7), request("x", max_new_tokens=9, until=[" stop"], doc_id=1)]
    assert chat().generate_until(requests) == ["x 7 stop here", "x 9"]
    assert chat(max_new_tokens=5).generate_until(requests) == ["x 5 stop here", "x 5"]
    with pytest.raises(UserError, match="num_beams=3"):
        chat().generate_until([request(num_beams=3)])
    with pytest.raises(UserError, match="do_sample=True"):
        chat().generate_until([request(do_sample=True)])


@pytest.mark.parametrize("images", [0, 2])
def test_one_image_a_question(chat, images):
    with pytest.raises(UserError, match="one user turn with one image"):
        chat().generate_until([request(images=images)])


def test_other_kinds_of_request_are_refused(chat):
    with pytest.raises(UserError, match="--force_simple"):
        chat().loglikelihood([])
    with pytest.raises(UserError):
        chat().generate_until_multi_round([])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("", "pretrained=DIR"),
        ("pretrained=x,temperature=1", "does not know the model argument temperature"),
        ("pretrained=x,batch_size=auto", "batch_size is 'auto'"),
        ("pretrained=x,max_new_tokens=0", "max_new_tokens is 0"),
        ("pretrained=x,batch_size=2.5", "batch_size is 2.5"),
        ("pretrained=x,box_format=norm01", "the checkpoint speaks int1000; box_format=norm01 is for plain LLaVAs"),
    ],
)
def test_a_wrong_model_argument_gets_one_sentence(arguments, says, monkeypatch, make_chat):
    chat, _ = make_chat()
    monkeypatch.setattr(lmms_model, "load_llava", lambda *args, **options: (chat.model, chat.processor))
    with pytest.raises(UserError, match=says) as error:
        RegionTowerChat.create_from_arg_string(arguments)
    assert "\n" not in str(error.value)


def test_model_arguments_are_cast(monkeypatch, make_chat, tmp_path):
    chat, _ = make_chat()
    seen = {}

    def load(name, **how):
        seen.update(name=name, **how)
        return chat.model, chat.processor

    monkeypatch.setattr(lmms_model, "load_llava", load)
    arguments = f"pretrained=123,max_new_tokens=7,resume={tmp_path}/log.jsonl"
    made = RegionTowerChat.create_from_arg_string(
        arguments, {"batch_size": "2", "max_batch_size": None, "device": None}
    )
    assert seen == {"name": "123", "device": "auto", "dtype": "auto", "quant": "none"}
    assert made.batch_size == 2 and made.max_new_tokens == 7
    assert made.log is not None
    made.clean()
    assert made.model is chat.model


def test_batches_share_pictures_and_go_from_long_to_short(make_chat):
    batches = []

    def answer(model, processor, questions, max_new_tokens, batch_size):
        batches.append([(question.image.getpixel((0, 0))[0], question.text) for question in questions])
        return [SimpleNamespace(text="x", boxes=None) for _ in questions]

    chat, _ = make_chat(answer=answer, batch_size=2)
    chat.task_dict["other"] = {"test": [{}] * 9}
    asked = [(0, "aa"), (1, "bbbbbb"), (2, "c"), (1, "b"), (0, "aaaa")]
    requests = []
    for number, (picture, text) in enumerate(asked):
        one = request(text, doc_id=picture)
        requests.append(SimpleNamespace(args=(*one.args[:3], number, *one.args[4:])))
    chat.generate_until(requests)
    assert batches == [[(1, "bbbbbb"), (1, "b")], [(0, "aaaa"), (0, "aa")], [(2, "c")]]
    assert len(set(chat.shown.values())) == 3 and chat.shown["other", 1] == chat.shown["other", 3]


def test_pictures_beyond_the_budget_are_read_again():
    pictures = [Image.new("RGB", (10, 10), (shade, 0, 0)) for shade in range(3)]
    held, reads = Pictures(budget=650), []

    def asked(number):
        def turn():
            reads.append(number)
            return pictures[number], "text"

        return Asked(str(number), keys[number], "text", [], turn, "task", number)

    keys = [held.put(picture) for picture in [*pictures, pictures[0].copy()]]
    assert keys[0] == keys[3] and len(set(keys)) == 3
    assert [held.get(asked(number)) is pictures[number] for number in range(3)] == [True] * 3
    assert reads == [2]  # two of 300 bytes fit


def test_a_killed_process_loses_only_the_batch_it_was_at(make_chat, tmp_path):
    """Killed by the system, not by an exception: nothing can tidy up."""
    requests, asked = [request(f"question {number}", doc_id=number) for number in range(10)], []

    def answer(model, processor, questions, max_new_tokens, batch_size):
        asked.extend(question.text for question in questions)
        if len(asked) == 6 and multiprocessing.parent_process() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return [SimpleNamespace(text=f"answer to {question.text}", boxes=None) for question in questions]

    def run_it():
        chat, _ = make_chat(answer=answer, batch_size=2, resume=tmp_path / "log.jsonl")
        chat.task_dict["other"] = {"test": [{}] * 10}
        return chat.generate_until(requests)

    child = multiprocessing.get_context("fork").Process(target=run_it)
    child.start()
    child.join(120)
    assert child.exitcode == -signal.SIGKILL
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 4
    assert run_it() == [f"answer to question {number}" for number in range(10)]
    assert asked == [f"question {number}" for number in range(4, 10)]


def test_boxes_scores_come_along_and_survive_a_restart(tiny_mllm, records_path, tmp_path, isolated_cache):
    for _ in range(2):
        chat = RegionTowerChat.from_module(*tiny_mllm, resume=tmp_path / "log.jsonl", progress=False)
        run(chat, task_folder(records_path, limit=4), ["regiontower_grounding"])
        assert set(chat.box_scores) == {("regiontower_grounding", number) for number in range(4)}
        scores = [score for found in chat.box_scores.values() for score in found or []]
        assert all(0 < score <= 1 for score in scores)
        chat._answer = None
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 4


def run(model, folder, tasks):
    """The answers by (task, doc_id), through lmms-eval; None in all processes but the first."""
    from lmms_eval import evaluator
    from lmms_eval.tasks import TaskManager

    manager = TaskManager("ERROR", include_path=str(folder), include_defaults=False, model_name="regiontower")
    results = evaluator.simple_evaluate(
        model=model, tasks=tasks, task_manager=manager, bootstrap_iters=0, log_samples=True, verbosity="ERROR"
    )
    if results is None:
        return None
    samples = results["samples"]
    return {(task, row["doc_id"]): row["filtered_resps"][0] for task in tasks for row in samples[task]}


TASKS = ["regiontower_grounding", "regiontower_referring", "regiontower_reading", "regiontower_absent"]


def rank(number, model, folder, log):
    chat = RegionTowerChat.from_module(*model, batch_size=4, resume=log, progress=False)
    assert (chat.rank, chat.world_size) == (number, 2)
    return run(chat, folder, TASKS)


def test_two_processes_give_the_answers_of_one(tiny_mllm, records_path, tmp_path, isolated_cache, in_processes):
    folder, log = task_folder(records_path), tmp_path / "log.jsonl"
    alone = run(RegionTowerChat.from_module(*tiny_mllm, batch_size=4, progress=False), folder, TASKS)
    first, second = in_processes(2, rank, tiny_mllm, folder, log)
    assert first == alone and second is None
    assert len(alone) == 27
    lines = [len((tmp_path / name).read_text().splitlines()) for name in ("log.jsonl", "log.rank1.jsonl")]
    assert sum(lines) == 27 and min(lines) >= 12  # each asked its half, and nothing twice


CHOICES = """
task: choose_one
dataset_path: parquet
dataset_kwargs: {data_files: {test: rows.parquet}}
test_split: test
output_type: multiple_choice
doc_to_visual: !function regiontower.eval.lmms_hooks.doc_to_visual
doc_to_text: question
doc_to_choice: choices
doc_to_target: gold
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
metadata: {version: 1.0}
"""


@pytest.fixture
def multiple_choice(tmp_path, noise_image):
    """A task of the kind of lmms-eval's `seedbench_ppl`, two pictures, two questions each."""
    from datasets import Dataset

    rows = []
    for number in range(4):
        path = tmp_path / f"{number // 2}.png"
        noise_image(seed=number // 2).save(path)
        question = ["What is in it?", "Where is the red star?"][number % 2]
        rows.append(
            {"image": str(path), "question": question, "choices": ["a blue heart", "none", "a sign"], "gold": 0}
        )
    (tmp_path / "task").mkdir()
    Dataset.from_list(rows).to_parquet(str(tmp_path / "task/rows.parquet"))
    (tmp_path / "task/choose_one.yaml").write_text(CHOICES)
    return tmp_path / "task", rows


def test_the_simple_class_chooses_among_answers(tiny_mllm, multiple_choice, tmp_path, monkeypatch):
    from lmms_eval import evaluator
    from lmms_eval.tasks import TaskManager

    monkeypatch.setenv("LMMS_EVAL_DATASETS_CACHE", str(tmp_path / "datasets"))
    folder, rows = multiple_choice

    def evaluate():
        simple = RegionTowerSimple.from_module(*tiny_mllm, batch_size=5, resume=tmp_path / "log.jsonl", progress=False)
        manager = TaskManager("ERROR", include_path=str(folder), include_defaults=False, model_name="regiontower")
        return evaluator.simple_evaluate(
            model=simple, tasks=["choose_one"], task_manager=manager, bootstrap_iters=0, verbosity="ERROR"
        )

    results = evaluate()
    shared = SharedAnswers(*tiny_mllm)
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    logged = {row: sorted(entry["loss"] for entry in log if entry["doc_id"] == row) for row in range(4)}
    right = 0
    for number, row in enumerate(rows):
        question = Question(Image.open(row["image"]).convert("RGB"), row["question"])
        losses = [one.loss for one in shared.score([question] * 3, row["choices"])]
        assert logged[number] == pytest.approx(sorted(losses), rel=1e-4)
        right += losses.index(min(losses)) == row["gold"]
    assert results["results"]["choose_one"]["acc,none"] == right / 4
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 12
    monkeypatch.setattr("regiontower.mllm.SharedAnswers.score", None)  # nothing is asked twice
    assert evaluate()["results"]["choose_one"] == results["results"]["choose_one"]


def test_the_simple_class_writes_answers_as_the_chat_class_does(tiny_mllm, noise_image):
    pictures = [noise_image(seed=seed) for seed in range(2)]
    chat = RegionTowerChat.from_module(*tiny_mllm, batch_size=3, progress=False)
    simple = RegionTowerSimple.from_module(*tiny_mllm, batch_size=3, progress=False)
    texts = ["Where is the star?", "What is it?", "Read the sign."]
    asked, answers = [(index, text) for index in range(2) for text in texts], []
    generation = {"max_new_tokens": 5}
    for model in (chat, simple):
        model.task_dict["other"] = {"test": [{"image": picture} for picture in pictures]}

    def messages(text):
        def turn(doc):
            return [
                {"role": "user", "content": [{"type": "image", "url": doc["image"]}, {"type": "text", "text": text}]}
            ]

        return turn

    def visual(doc):
        return [doc["image"]]

    answers = chat.generate_until(
        [SimpleNamespace(args=(text, messages(text), generation, index, "other", "test")) for index, text in asked]
    )
    assert answers == simple.generate_until(
        [SimpleNamespace(args=(text, generation, visual, index, "other", "test")) for index, text in asked]
    )
    assert len(set(answers)) > 2
    for broken in (lambda doc: [], lambda doc: [doc["image"]] * 2, None):
        with pytest.raises(UserError, match="one image a question"):
            simple.generate_until([SimpleNamespace(args=("x", generation, broken, 0, "other", "test"))])
