"""Token ids and labels of conversations."""

import pytest

from regiontower.mllm.boxes import Boxes, box_format
from regiontower.train_stages.conversation_ids import IGNORED, conversation_ids
from regiontower.train_stages.conversations import RenderedTurn
from regiontower.vision_towers import UserError

BOX = (12.0, 9.0, 60.0, 45.0)
TURNS = [
    RenderedTurn("What is in <region>?", (BOX,), "a blue heart"),
    RenderedTurn("Where is the star?", (), "[12, 345, 678, 1000]"),
    RenderedTurn("Read <region>.", (BOX,), "none"),
]


@pytest.fixture
def processor(tiny_mllm):
    return tiny_mllm[1]


def test_only_answers_and_the_end_of_their_turn_are_learned(processor):
    frame = processor.frame((120, 90))
    ids, labels, count = conversation_ids(processor, TURNS, frame, 500)
    assert count == 3 and len(ids) == len(labels)
    assert all(label in (IGNORED, token) for token, label in zip(ids, labels, strict=True))
    learned = processor.tokenizer.decode([label for label in labels if label != IGNORED])
    assert learned == "".join(f"{turn.answer}<|end|>" for turn in TURNS)


def test_ids_are_those_of_the_chat_template_with_the_placeholders_filled(processor):
    frame = processor.frame((120, 90))
    ids, _, _ = conversation_ids(processor, TURNS, frame, 500)
    assert ids.count(processor.image_token_id) == processor.image_tokens(frame)
    assert ids.count(processor.region_token_id) == 2
    messages = []
    for number, turn in enumerate(TURNS):
        image = [{"type": "image"}] if number == 0 else []
        messages.append({"role": "user", "content": [*image, {"type": "text", "text": turn.question}]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": turn.answer}]})
    whole = processor.write(processor.apply_chat_template(messages), frame, Boxes([BOX, BOX]))
    assert processor.tokenizer.decode(ids) == processor.tokenizer.decode(processor.tokenizer(whole)["input_ids"])
    assert box_format("int1000").write(Boxes([BOX]), frame) in processor.tokenizer.decode(ids)


def test_turns_that_do_not_fit_are_left_out_whole(processor):
    frame = processor.frame((120, 90))
    whole, _, _ = conversation_ids(processor, TURNS, frame, 500)
    two, labels, count = conversation_ids(processor, TURNS, frame, len(whole) - 1)
    assert count == 2 and whole[: len(two)] == two and labels[-1] != IGNORED
    with pytest.raises(UserError, match=r"raise data\.max_tokens"):
        conversation_ids(processor, TURNS, frame, 40)
