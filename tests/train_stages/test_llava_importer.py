import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from regiontower.train_stages.importers.llava import LlavaSample, read_llava_conversations
from regiontower.train_stages.record_io import RecordSet, read_records
from regiontower.vision_towers.errors import UserError


def talk(*texts: str, first: str = "human", **fields) -> dict[str, Any]:
    speakers = ("human", "gpt") if first == "human" else ("gpt", "human")
    turns = [{"from": speakers[index % 2], "value": text} for index, text in enumerate(texts)]
    return {"id": "1", "image": "images/1.png", "conversations": turns, **fields}


DESCRIBED = talk("<image>\nDescribe the image concisely.", "A gray wall.", "Is it old?", "Yes.")
ASKED = talk("Is it old?\n<image>", "Yes.")
TEXT_ONLY = {"id": "3", "conversations": talk("Hello?", "Hello.")["conversations"]}


@pytest.fixture(params=["list", "lines"])
def llava_file(tmp_path, request):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (40, 30), "gray").save(tmp_path / "images" / "1.png")

    def write(*items: Any) -> Path:
        path = tmp_path / "talk"
        path.write_text(
            json.dumps(items, indent=1) if request.param == "list" else "\n".join(json.dumps(item) for item in items)
        )
        return path

    return write


def test_llava_conversations_keep_every_turn(llava_file, tmp_path):
    system = talk("<image>\nWhat is this?", "A wall.")
    system["conversations"].insert(0, {"from": "system", "value": "Be brief."})
    found = read_llava_conversations(llava_file(DESCRIBED, TEXT_ONLY, system), check_images=True)
    assert found.summary() == "3 conversations, 0 bad"
    assert [sample.image for sample in found] == [tmp_path / "images/1.png", None, tmp_path / "images/1.png"]
    assert found[0].turns == [
        ("user", "<image>\nDescribe the image concisely."),
        ("assistant", "A gray wall."),
        ("user", "Is it old?"),
        ("assistant", "Yes."),
    ]
    assert [role for role, _ in found[2].turns] == ["system", "user", "assistant"]
    assert isinstance(found[1], LlavaSample)
    assert len(found) == 3


@pytest.mark.parametrize("system", [True, False])
@pytest.mark.parametrize(
    "item",
    [
        talk("Hello.", "<image>\nWhat is this?", "A wall.", first="gpt"),
        talk("<image>\nWhat is this?", "A wall.", "Is it old?"),
        talk("Hello.", "<image>\nWhat is this?", "A wall.", "Is it old?", first="gpt"),
    ],
)
def test_what_has_no_question_or_no_answer_is_left_out(llava_file, item, system):
    turns = item["conversations"]
    said = [{"from": "system", "value": "Be brief."}] if system else []
    found = read_llava_conversations(llava_file({**item, "conversations": [*said, *turns]}))
    expected = [("user", "<image>\nWhat is this?"), ("assistant", "A wall.")]
    assert found[0].turns == [("system", "Be brief.")] * system + expected
    assert not found.bad


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (talk("Describe it.", "A wall."), "<image> once, in the first human turn"),
        (talk("<image> <image>", "A wall."), "it holds it 2 times"),
        (talk("<image>", "A wall.", "<image>", "Yes."), "it holds it 2 times"),
        (talk("Hello", "<image>"), "<image> once"),
        (talk("<image>", "A wall.", image=None), "has no image"),
        (talk("<image>"), "a question and an answer"),
        (talk(), "a question and an answer"),
        (talk("<image>", " "), "turn 1 is blank"),
        (talk("<image>", "A wall.", " "), "turn 2 is blank"),
        (talk("", "<image>", "A wall.", first="gpt"), "turn 0 is blank"),
        (talk("<image> Hi.", "What is it?", "A wall.", first="gpt"), "in the first human turn"),
        (talk("<image>", "A wall.", image=["a.png", "b.png"]), "'image'"),
        ({"image": "images/1.png"}, "'conversations' is missing"),
        (
            talk("<image>", "x", conversations=[{"from": "gpt", "value": "x"}, {"from": "human", "value": "y"}]),
            "a question and an answer",
        ),
        (
            talk("<image>", "x", conversations=[{"from": "gpt", "value": "x"}, {"from": "gpt", "value": "y"}]),
            "turn 1 is from 'assistant'; turns must alternate",
        ),
        (
            talk("<image>", "x", conversations=[{"from": "human", "value": "x"}, {"from": "human", "value": "y"}]),
            "turn 1 is from 'user'; turns must alternate",
        ),
        (talk("<image>", "x", conversations=[{"from": "robot", "value": "x"}]), "'robot'"),
        (talk("<image>", "x", conversations=["x"]), "not an object"),
        (7, "not an object"),
    ],
)
def test_llava_faults_are_named(llava_file, item, message):
    path = llava_file(DESCRIBED, item)
    found = read_llava_conversations(path)
    assert len(found) == 1
    assert len(found.bad) == 1
    assert message in found.bad[0].reason
    imported = read_records(path, format="llava")
    assert len(imported) == 1
    assert imported.bad == found.bad


def test_llava_missing_images(llava_file, tmp_path):
    path = llava_file(DESCRIBED, talk("<image>", "A wall.", image="images/2.png"))
    assert len(read_llava_conversations(path)) == 2
    checked = read_llava_conversations(path, check_images=True)
    assert len(checked) == 1
    assert "images/2.png" in checked.bad[0].reason
    imported = read_records(path, format="llava")
    assert len(imported) == 1
    assert f"image_root is {tmp_path}" in imported.bad[0].reason


def test_llava_too_many_bad_conversations_stop(llava_file):
    with pytest.raises(UserError, match="6 of 7 records are bad"):
        read_llava_conversations(llava_file(DESCRIBED, *[{"id": 1}] * 6))


def test_llava_importer_takes_answers_to_description_prompts_as_captions(llava_file):
    plain = talk("<image>", "A plain wall.")
    curly = talk("Present a compact description of the photo’s key features.\n<image>", "Gray.")
    found: RecordSet = read_records(llava_file(DESCRIBED, ASKED, TEXT_ONLY, plain, curly), format="llava")
    assert [record.captions for record in found.records] == [["A gray wall."], ["A plain wall."], ["Gray."]]
    assert {(record.image, record.width, record.height) for record in found.records} == {("images/1.png", 40, 30)}
    assert found.passed_over == 2
    assert found.summary() == "3 records, 0 bad, 2 passed over (nothing in them for a region record)"


def test_llava_file_without_captions_is_refused(llava_file):
    with pytest.raises(UserError, match="none of its 1 records can be used; none of them holds anything"):
        read_records(llava_file(ASKED), format="llava")
