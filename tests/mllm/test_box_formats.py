"""The text conventions: exact examples, what is read as a box, and what is not."""

import re
from pathlib import Path

import numpy as np
import pytest
from box_examples import BOX, EXAMPLES, FRAME, SIZE, assert_within_a_quantum, every_format

from regiontower.mllm.boxes import BOX_FORMATS, Boxes, ImageFrame, box_format, score_boxes
from regiontower.vision_towers.errors import UserError

LABELLED = {
    "norm01": "a cat [0.10, 0.30, 0.60, 0.55]",
    "shikra": "a cat [0.100,0.300,0.600,0.550]",
    "square100": "a cat [10,30,60,55]",
    "int1000": "a cat [100, 100, 600, 600]",
    "qwen2": "<|object_ref_start|>a cat<|object_ref_end|><|box_start|>(100,100),(600,600)<|box_end|>",
    "qwen2_5_json": '[{"bbox_2d": [10, 30, 60, 55], "label": "a cat"}]',
    "qwen3_json": '[{"bbox_2d": [100, 100, 600, 600], "label": "a cat"}]',
    "deepseek_det": "<|ref|>a cat<|/ref|><|det|>[[100, 100, 599, 599]]<|/det|>",
    "internvl_box": "<ref>a cat</ref><box>[[100, 100, 600, 600]]</box>",
    "kosmos_patch": "<phrase>a cat</phrase><object><patch_index_0291><patch_index_0563></object>",
    "pixel": "a cat [20, 10, 120, 60]",
}
SEVERAL = {
    "norm01": "[0.10, 0.30, 0.60, 0.55] [0.00, 0.25, 1.00, 0.75]",
    "shikra": "[0.100,0.300,0.600,0.550;0.000,0.250,1.000,0.750]",
    "square100": "[10,30,60,55] [0,25,100,75]",
    "int1000": "[100, 100, 600, 600] [0, 0, 1000, 1000]",
    "qwen2": "<|box_start|>(100,100),(600,600)<|box_end|><|box_start|>(0,0),(1000,1000)<|box_end|>",
    "qwen2_5_json": '[{"bbox_2d": [10, 30, 60, 55]}, {"bbox_2d": [0, 25, 100, 75]}]',
    "qwen3_json": '[{"bbox_2d": [100, 100, 600, 600]}, {"bbox_2d": [0, 0, 1000, 1000]}]',
    "deepseek_det": "<|det|>[[100, 100, 599, 599], [0, 0, 999, 999]]<|/det|>",
    "internvl_box": "<box>[[100, 100, 600, 600], [0, 0, 1000, 1000]]</box>",
    "kosmos_patch": "</delimiter_of_multi_objects/>".join(
        ["<patch_index_0291><patch_index_0563>", "<patch_index_0256><patch_index_0767>"]
    ),
    "pixel": "[20, 10, 120, 60] [0, 0, 200, 100]",
}


@every_format
def test_the_examples(name):
    fmt = box_format(name)
    assert fmt.name == name
    assert fmt.write(Boxes([BOX]), FRAME) == EXAMPLES[name]
    assert fmt.write(Boxes([BOX]), FRAME, labels=["a cat"]) == LABELLED[name]
    assert fmt.write(Boxes([BOX, (0, 0, 200, 100)]), FRAME) == SEVERAL[name]


@every_format
def test_the_examples_are_read_back(name):
    fmt = box_format(name)
    both = Boxes([BOX, (0, 0, 200, 100)])
    for text, expected in [(EXAMPLES[name], both[:1]), (LABELLED[name], both[:1]), (SEVERAL[name], both)]:
        parsed = fmt.parse(text, FRAME)
        assert parsed.status == "boxes" and len(parsed.boxes) == len(expected) == len(parsed.spans)
        assert_within_a_quantum(parsed.boxes, expected, name, FRAME)
        assert parsed.scores is None


@every_format
def test_neighbours_with_one_label_are_read_back(name):
    boxes, labels = Boxes([BOX, (0, 0, 200, 100), (50, 50, 99, 99)]), ["cat", "cat", None]
    parsed = box_format(name).parse(box_format(name).write(boxes, FRAME, labels), FRAME)
    assert_within_a_quantum(parsed.boxes, boxes, name, FRAME)


def test_the_declared_quantum_in_original_pixels():
    expected = {
        "norm01": 2,
        "square100": 2,
        "shikra": 0.2,
        "int1000": (0.2, 0.1),
        "qwen2_5_json": 2,
        "kosmos_patch": 6.25,
        "pixel": 1,
    }
    for name, quantum in expected.items():
        assert box_format(name).quantum(FRAME) == pytest.approx(np.broadcast_to(quantum, 2))
    assert box_format("deepseek_det").quantum(FRAME) == pytest.approx((200 / 999, 100 / 999))


@every_format
def test_text_around_the_boxes_is_allowed(name):
    text = f"The cat, 3 years old, is here: {EXAMPLES[name]}. It (the cat) sleeps.\n"
    parsed = box_format(name).parse(text, FRAME)
    assert parsed.status == "boxes" and len(parsed.boxes) == 1
    (start, end) = parsed.spans[0]
    assert EXAMPLES[name].find(text[start:end]) >= 0 and end - start >= 13


@every_format
def test_no_box(name):
    fmt = box_format(name)
    assert fmt.write(Boxes.empty(), FRAME) == "none"
    for text in ["none", "None.", "", " ", "a red car, 12 years old", "12, 34, 56, 78"]:
        parsed = fmt.parse(text, FRAME)
        assert parsed.status == "none" and len(parsed.boxes) == 0 and parsed.spans == []


@every_format
def test_a_good_box_beside_a_broken_one_is_malformed(name):
    good = EXAMPLES[name]
    for text in [f"{good} {good[:-1]}", f"{good[: len(good) - 4]} {good}", good[:-1]]:
        parsed = box_format(name).parse(text, FRAME)
        assert parsed.status == "malformed" and len(parsed.boxes) == 0 and parsed.spans == []


def fill(name: str, x1: object, y1: object, x2: object, y2: object) -> str:
    """The format's text around any four things."""
    return {
        "norm01": f"[{x1}, {y1}, {x2}, {y2}]",
        "shikra": f"[{x1},{y1},{x2},{y2}]",
        "square100": f"[{x1},{y1},{x2},{y2}]",
        "int1000": f"[{x1}, {y1}, {x2}, {y2}]",
        "qwen2": f"<|box_start|>({x1},{y1}),({x2},{y2})<|box_end|>",
        "qwen2_5_json": f'[{{"bbox_2d": [{x1}, {y1}, {x2}, {y2}]}}]',
        "qwen3_json": f'[{{"bbox_2d": [{x1}, {y1}, {x2}, {y2}]}}]',
        "deepseek_det": f"<|det|>[[{x1}, {y1}, {x2}, {y2}]]<|/det|>",
        "internvl_box": f"<box>[[{x1}, {y1}, {x2}, {y2}]]</box>",
        "pixel": f"[{x1}, {y1}, {x2}, {y2}]",
    }[name]


# name -> one quantum as text, the largest x, one quantum more, and two more
EDGES = {
    "norm01": (0.01, 1, 1.01, 1.02),
    "shikra": (0.001, 1, 1.001, 1.002),
    "square100": (1, 100, 101, 102),
    "int1000": (1, 1000, 1001, 1002),
    "qwen2": (1, 1000, 1001, 1002),
    "qwen2_5_json": (1, 100, 101, 102),
    "qwen3_json": (1, 1000, 1001, 1002),
    "deepseek_det": (1, 999, 1000, 1001),
    "internvl_box": (1, 1000, 1001, 1002),
    "pixel": (1, 200, 201, 202),
}
number_formats = pytest.mark.parametrize("name", EDGES)


@number_formats
def test_out_of_range_by_one_quantum_is_clipped_and_more_is_malformed(name):
    fmt, (one, top, over, far) = box_format(name), EDGES[name]
    exact = fmt.parse(fill(name, 0, 0, top, one), FRAME)
    assert exact.status == "boxes" and exact.boxes[0][0] == 0 and exact.boxes[0][2] == 200
    assert fmt.parse(fill(name, f"-{one}", 0, over, one), FRAME).boxes == exact.boxes
    assert fmt.parse(fill(name, 0, 0, far, one), FRAME).status == "malformed"
    assert fmt.parse(fill(name, f"-{2 * one}", 0, top, one), FRAME).status == "malformed"


@number_formats
def test_what_is_no_box_is_malformed(name):
    fmt, (one, top, _, _) = box_format(name), EDGES[name]
    assert fmt.parse(fill(name, 0, 0, top, one), FRAME).status == "boxes"
    for bad in [
        fill(name, top, 0, one, one),  # inverted
        fill(name, 0, one, top, 0),
        *(fill(name, 0, 0, top, word) for word in ["nan", "inf", "-inf", "NaN", "Infinity", "1e0", "٣", "１", "", "x"]),
        *(
            fill(name, 0, 0, top, word)
            for word in ["9" * 400, "9" * 6000, "1" * 13, "+1", "0x1", "1_0", "null", "true"]
        ),
        fill(name, 0, 0, top, f"{one}, {one}"),  # five numbers
        fill(name, 0, 0, top, "").replace(", ]", "]").replace(",]", "]").replace(",)", ")"),  # three numbers
        fill(name, 0, 0, top, f"[{one}]"),
        fill(name, 0, 0, top, f"({one})"),
    ]:
        assert fmt.parse(bad, FRAME).status == "malformed", bad[:80]


def test_one_convention_is_never_read_as_another():
    for name in ["int1000", "pixel", "qwen2", "deepseek_det", "internvl_box", "qwen3_json", "qwen2_5_json"]:
        assert box_format(name).parse(fill(name, 0.1, 0.1, 0.5, 0.5), FRAME).status == "malformed"
    for name in ["norm01", "shikra"]:
        assert box_format(name).parse(fill(name, 100, 100, 500, 500), FRAME).status == "malformed"
    assert box_format("int1000").parse("[[1, 2, 3, 4]]", FRAME).status == "malformed"
    assert box_format("internvl_box").parse("<box>[1, 2, 3, 4]</box>", FRAME).status == "malformed"
    assert box_format("int1000").parse("[1, 2, 3, 4;5, 6, 7, 8]", FRAME).status == "malformed"
    assert box_format("qwen3_json").parse('{"bbox_2d": [1, 2, 3, 4]}', FRAME).status == "malformed"
    assert box_format("qwen3_json").parse("[[1, 2, 3, 4]]", FRAME).status == "malformed"


def test_json_details():
    fmt = box_format("qwen3_json")
    assert fmt.parse('```json\n[{"label": "a [b]", "bbox_2d" :\n[1, 2, 3, 4]}]\n```', FRAME).status == "boxes"
    assert fmt.parse("[]", FRAME).status == "none"
    labelled = fmt.write(Boxes([BOX]), FRAME, ['a "quoted" \\ [1, 2, 3, 4] "bbox_2d": [5]'])
    assert fmt.parse(labelled, FRAME).boxes == fmt.parse(EXAMPLES["qwen3_json"], FRAME).boxes
    for bad in [
        '[{"bbox_2d": [1, 2, 3, 4], "bbox_2d": [1, 2, 3, 4]}]',
        '[{"bbox_2d": [1, 2, 3, 4], "part": {"bbox_2d": [1, 2, 3, 4]}}]',
        '[{"label": "cat"}]',
        '[{"bbox_2d": {}}]',
        '[{"bbox_2d": [1, 2, 3, 4]}] [{"bbox_2d": [1, 2, 3, 4]}]',
        '[{"bbox_2d": [1, 2, 3, 4]',
        '{"bbox_2d": null}',
        "[1]",
    ]:
        assert fmt.parse(bad, FRAME).status == "malformed", bad


def test_kosmos_patches_as_the_paper_reads_them():
    # transformers' Kosmos2Processor turns this pair into (0.390625, 0.046875, 0.984375, 0.828125).
    frame = ImageFrame.resize((320, 320), (224, 224))
    parsed = box_format("kosmos_patch").parse("<patch_index_0044><patch_index_0863>", frame)
    np.testing.assert_allclose(parsed.boxes.xyxy / 320, [[0.390625, 0.046875, 0.984375, 0.828125]])
    one = box_format("kosmos_patch").parse("<patch_index_0033><patch_index_0033>", frame)
    assert one.boxes == Boxes([[10, 10, 20, 20]])
    for bad in [
        "<patch_index_0044>",
        "<patch_index_0044> <patch_index_0863>",
        "<patch_index_0863><patch_index_0044>",
        "<patch_index_0005><patch_index_0034>",  # left of it
        "<patch_index_0044><patch_index_1024>",
        "<patch_index_44><patch_index_863>",
        "<patch_index_0044><patch_index_0863><patch_index_0044><patch_index_0863>",
        "<patch_index_0044><patch_index_0863",
    ]:
        assert box_format("kosmos_patch").parse(bad, frame).status == "malformed", bad


def test_labels():
    fmt = box_format("int1000")
    with pytest.raises(UserError, match="2 labels"):
        fmt.write(Boxes([BOX]), FRAME, ["a", "b"])
    with pytest.raises(UserError, match=r"label 0 .*reserves"):
        fmt.write(Boxes([BOX]), FRAME, ["a [b]"])
    with pytest.raises(UserError, match="reserves"):
        box_format("qwen2").write(Boxes([BOX]), FRAME, ["<|box_start|>"])
    assert fmt.write(Boxes([BOX]), FRAME, [""]) == EXAMPLES["int1000"]
    crop = ImageFrame.crop((200, 100), (100, 0, 200, 100), (50, 50))
    text = fmt.write(Boxes([(0, 0, 50, 50), (90, 0, 150, 100)]), crop, ["gone", "cut"])
    assert text == "cut [500, 0, 750, 1000]"


def test_unknown_name():
    with pytest.raises(UserError, match=r"did you mean 'int1000'.*norm01"):
        box_format("int_1000")


def test_odd_padding_of_the_square_is_rounded_down():
    # 201 x 100 pads 101 rows: 50 above, 51 below.
    whole = Boxes([[0, 0, 201, 100]])
    assert box_format("shikra").write(whole, ImageFrame.identity((201, 100))) == "[0.000,0.249,1.000,0.746]"
    assert box_format("shikra").write(whole[[0]], ImageFrame.letterbox((201, 100), 56)) == "[0.000,0.249,1.000,0.746]"


def test_a_box_without_area_at_the_far_corner_stays_in_range():
    corner, frame = Boxes([[200, 100, 200, 100]]), ImageFrame.identity(SIZE)
    assert box_format("int1000").write(corner, frame) == "[999, 999, 1000, 1000]"
    assert box_format("kosmos_patch").write(corner, frame) == "<patch_index_1023><patch_index_1023>"


def test_a_box_in_the_padding_comes_back_without_area():
    parsed = box_format("norm01").parse("[0.10, 0.00, 0.60, 0.10]", FRAME)
    assert parsed.status == "boxes" and parsed.boxes == Boxes([[20, 0, 120, 0]])


@every_format
def test_a_thin_box_keeps_an_area(name):
    fmt, size = box_format(name), (3000, 2000)
    for frame in [ImageFrame.letterbox(size, 56), ImageFrame.crop(size, (-100, 50, 700, 900), (64, 64))]:
        visible = frame.visible_xyxy
        for x in [visible[0], 300.0, 333.33, visible[2] - 0.01]:
            thin = Boxes([[x, visible[1], x + 0.01, visible[3]]])
            parsed = fmt.parse(fmt.write(thin, frame), frame)
            assert len(parsed.boxes) == 1 and parsed.boxes.area[0] > 0
            assert_within_a_quantum(parsed.boxes, frame.visible_part(thin)[0], name, frame)


def test_scores_are_the_mean_of_the_tokens_on_the_box():
    text = "cat [100, 100, 600, 600] dog [0, 0, 10, 10]"
    parsed = box_format("int1000").parse(text, FRAME)
    spans = [(0, 4), (4, 14), (14, 25), (25, 29), (29, 43)]
    scored = score_boxes(parsed, spans, [0.1, 0.5, 0.7, 0.2, 0.9])
    assert scored.scores == pytest.approx([0.6, 0.9]) and scored.boxes == parsed.boxes and parsed.scores is None
    nothing = score_boxes(box_format("int1000").parse("none", FRAME), [(0, 4)], [0.3])
    assert nothing.scores == [] and nothing.status == "none"
    with pytest.raises(UserError, match="one each"):
        score_boxes(parsed, spans, [0.1])
    with pytest.raises(UserError, match="no token lies on box 1"):
        score_boxes(parsed, spans[:4], [0.1, 0.5, 0.7, 0.2])


def test_the_documentation_shows_what_the_code_does():
    page = (Path(__file__).parents[2] / "docs" / "boxes.md").read_text(encoding="utf-8")
    rows = {row.split("`")[1]: row.replace("\\|", "|") for row in page.splitlines() if row.startswith("| `")}
    for name in BOX_FORMATS:
        assert f"`{EXAMPLES[name]}` |" in rows[name]
        declared = {"original": "original", "padded_square": "padded square", "input": "model input"}
        assert f"| {declared[box_format(name).grid.frame]} |" in rows[name]
    blocks = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "docs/boxes.md", "exec"), {})
