"""How models that are not ours are asked, and how their answers are read."""

import numpy as np
import pytest
from PIL import Image

from regiontower.eval.conventions import CONVENTIONS, bind, convention, convention_of, parse_answer, shown_picture
from regiontower.eval.task_rows import TaskRow
from regiontower.mllm.boxes import Boxes, box_format
from regiontower.train_stages.masks import encode_mask
from regiontower.vision_towers.errors import UserError

SIZE = (300, 200)
BOX = [30.0, 40.0, 150.0, 120.0]


def row(**fields):
    known = {"phrase": "", "question": "What is in <region>?", "prompt_boxes": [BOX], "target_xyxy": BOX}
    return TaskRow(
        image="a.png", width=300, height=200, image_id="a", region_index=0, answers=["cup"], **known | fields
    )


def doc(name, **fields):
    return {
        "width": 300,
        "height": 200,
        "convention": name,
        "prompt_boxes": [BOX],
        "point_xy": [],
        "shape": "",
        **fields,
    }


def test_every_class_has_the_convention_it_was_trained_on():
    assert convention_of("qwen2_5_vl").box_format == "qwen2_5_json"
    assert convention_of("llava_hf").box_format == "norm01"
    assert convention_of("vllm", "qwen3_vl").box_format == "qwen3_json"
    for endpoint in ("vllm", "openai", "async_openai"):  # they may hold any model
        with pytest.raises(UserError, match=f"{endpoint}; declare it with --convention: llava15"):
            convention_of(endpoint)
    with pytest.raises(UserError, match="did you mean 'qwen2_5_vl'"):
        convention("qwen2.5_vl")


def test_a_phrase_is_asked_for_in_the_models_own_words():
    asked = row(phrase="the red cup", question="Where is the red cup?", prompt_boxes=[])
    texts = {name: bind("regiontower_grounding", asked, how).question for name, how in CONVENTIONS.items()}
    assert texts["llava15"].endswith("the region this sentence describes: the red cup")
    assert '"bbox_2d": [x1, y1, x2, y2]' in texts["qwen2_5_vl"] and "{" in texts["qwen2_5_vl"]
    assert "thousandths" in texts["int1000"]
    assert all("the red cup" in text for text in texts.values())
    for how in CONVENTIONS.values():  # the same words for what is there and for what is not
        assert bind("regiontower_absent", asked, how) == bind("regiontower_grounding", asked, how)
        assert "all" in (several := bind("regiontower_several", asked, how).question) or "every" in several


def test_regions_are_written_in_the_frame_of_the_sent_picture():
    assert (
        "the region [0.10, 0.30, 0.50, 0.57]" in bind("regiontower_referring", row(), CONVENTIONS["llava15"]).question
    )
    qwen = CONVENTIONS["qwen2_5_vl"]
    width, height = qwen.frame(SIZE).input_size
    x1, y1, x2, y2 = (round(v * s) for v, s in zip(BOX, (width / 300, height / 200) * 2, strict=True))
    assert f"the region [{x1}, {y1}, {x2}, {y2}]" in bind("regiontower_reading", row(), qwen).question
    assert "the red box" in bind("regiontower_referring", row(), CONVENTIONS["int1000"]).question


def test_qwens_picture_is_one_that_its_processor_leaves_alone():
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

    how = CONVENTIONS["qwen2_5_vl"]
    for size in [(300, 200), (33, 900), (4000, 3000), (640, 480), (1, 1)]:
        if max(size) / min(size) > 200:
            continue
        width, height = how.frame(size).input_size
        assert width % 28 == height % 28 == 0
        # Defaults of lmms-eval's class, and of the model's own processor.
        for least, most in ((256 * 28 * 28, 1605632), (4 * 28 * 28, 16384 * 28 * 28)):
            assert smart_resize(height, width, 28, least, most) == (height, width)
    picture = shown_picture(doc("qwen2_5_vl"), Image.new("RGB", SIZE))
    assert picture.size == how.frame(SIZE).input_size


def test_llavas_picture_is_the_padded_square():
    picture = shown_picture(doc("llava15"), Image.new("RGB", SIZE, (255, 0, 0)))
    assert picture.size == (300, 300)
    pixels = np.asarray(picture)
    assert (pixels[50:250] == (255, 0, 0)).all() and not (pixels[:50] == (255, 0, 0)).all(axis=-1).any()


@pytest.mark.parametrize("name", CONVENTIONS)
def test_answers_are_read_by_the_declared_convention_alone(name):
    how = CONVENTIONS[name]
    frame = how.frame(SIZE)
    own = box_format(how.box_format)
    parsed = parse_answer(doc(name), own.write(Boxes([BOX]), frame))
    assert parsed.status == "boxes"
    assert np.abs(np.subtract(parsed.boxes[0], BOX)).max() <= max(own.quantum(frame))
    assert parse_answer(doc(name), "").status == "malformed"  # a swallowed error is no "nothing fits"
    assert parse_answer(doc(name), "none").status == "none"


def test_rows_of_our_own_class_are_left_alone():
    picture = Image.new("RGB", SIZE)
    assert shown_picture({"convention": ""}, picture) is picture
    assert shown_picture({}, picture) is picture
    assert parse_answer({"width": 300, "height": 200}, "[100, 200, 500, 600]").boxes[0] == pytest.approx(BOX)


def test_regions_are_drawn_where_they_are():
    picture = Image.new("RGB", SIZE, (200, 200, 200))

    def red(**fields):
        pixels = np.asarray(shown_picture(doc("int1000", **fields), picture)).astype(int)
        rows, columns = np.nonzero((pixels[..., 0] > 150) & (pixels[..., 1] < 120))
        return columns.min(), rows.min(), columns.max() + 1, rows.max() + 1

    assert red() == pytest.approx(BOX)
    x0, y0, x1, y1 = red(point_xy=[60, 80], prompt_boxes=[[57.5, 77.5, 62.5, 82.5]])
    assert (x0 + x1) / 2 == pytest.approx(60, abs=1) and (y0 + y1) / 2 == pytest.approx(80, abs=1) and x1 - x0 < 15
    mask = np.zeros((200, 300), dtype=bool)
    mask[50:70, 100:140] = True
    assert red(shape=encode_mask(mask)["counts"], prompt_boxes=[[100, 50, 140, 70]]) == (100, 50, 140, 70)
    dot = bind("regiontower_classify_point", row(point_xy=[60, 80]), CONVENTIONS["int1000"]).question
    assert "the red dot" in dot
