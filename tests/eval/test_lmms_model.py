from importlib.metadata import entry_points
from types import SimpleNamespace

import pytest
from PIL import Image

pytest.importorskip(
    "lmms_eval", exc_type=ImportError, reason="lmms-eval is not installed (pip install 'regiontower[eval]')"
)

from regiontower.eval import lmms_model
from regiontower.eval.lmms_model import RegionTowerChat
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
    with pytest.raises(UserError):
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
    ],
)
def test_a_wrong_model_argument_gets_one_sentence(arguments, says, monkeypatch, make_chat):
    chat, _ = make_chat()
    monkeypatch.setattr(lmms_model, "load_mllm", lambda *args, **options: (chat.model, chat.processor))
    with pytest.raises(UserError, match=says) as error:
        RegionTowerChat.create_from_arg_string(arguments)
    assert "\n" not in str(error.value)


def test_model_arguments_are_cast(monkeypatch, make_chat, tmp_path):
    chat, _ = make_chat()
    seen = {}

    def load(name, device, dtype):
        seen.update(name=name, device=device, dtype=dtype)
        return chat.model, chat.processor

    monkeypatch.setattr(lmms_model, "load_mllm", load)
    arguments = f"pretrained=123,max_new_tokens=7,resume={tmp_path}/log.jsonl"
    made = RegionTowerChat.create_from_arg_string(
        arguments, {"batch_size": "2", "max_batch_size": None, "device": None}
    )
    assert seen == {"name": "123", "device": "auto", "dtype": "auto"}
    assert made.batch_size == 2 and made.max_new_tokens == 7
    assert made.log is not None
    made.clean()
    assert made.model is chat.model
