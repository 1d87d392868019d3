"""RegionLlavaProcessor: prompts, frames and boxes."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from regiontower.mllm.boxes import Boxes, Points, box_format
from regiontower.mllm.processing import RegionLlavaProcessor
from regiontower.vision_towers import UserError

BOX = (12.0, 9.0, 60.0, 45.0)


@pytest.fixture(scope="module")
def processor(tiny_mllm):
    return tiny_mllm[1]


def prompted(processor, region_prompt: str) -> RegionLlavaProcessor:
    return RegionLlavaProcessor(
        processor.image_processor, processor.tokenizer, patch_size=8, image_size=64, region_prompt=region_prompt
    )


@pytest.mark.parametrize(
    ("region_prompt", "expected"),
    [
        ("tokens", "<region>"),
        ("coords", "[100, 100, 500, 500]"),
        ("tokens+coords", "<region> [100, 100, 500, 500]"),
        ("overlay", "the red box"),
    ],
)
def test_region_prompts(processor, noise_image, region_prompt, expected):
    processor = prompted(processor, region_prompt)
    inputs = processor([noise_image(120, 90)], ["<image>What is in <region>?"], boxes=[[BOX]])
    text = processor.tokenizer.decode(inputs["input_ids"][0]).replace("<image>", "")
    assert f"What is in {expected}?" in text
    assert ("boxes" in inputs) == ("tokens" in region_prompt)
    plain = prompted(processor, "tokens")([noise_image(120, 90)], ["<image>?"])
    assert torch.equal(inputs["pixel_values"], plain["pixel_values"]) == (region_prompt != "overlay")


@given(
    width=st.integers(16, 400),
    height=st.integers(16, 400),
    corners=st.tuples(*[st.floats(0, 1) for _ in range(4)]),
)
def test_boxes_reach_the_model_in_its_input_frame(processor, width, height, corners):
    (x1, x2), (y1, y2) = sorted(corners[:2]), sorted(corners[2:])
    box = (x1 * width, y1 * height, min(x2 * width + 1, width), min(y2 * height + 1, height))
    box = (min(box[0], box[2] - 0.5), min(box[1], box[3] - 0.5), box[2], box[3])
    inputs = processor([Image.new("RGB", (width, height))], ["<image><region>"], boxes=[[box]])
    assert inputs["boxes"].dtype == torch.float32 and inputs["region_counts"].tolist() == [1]
    frame = processor.frame((width, height))
    expected = np.array(box).reshape(2, 2) * frame.scale + frame.offset
    np.testing.assert_allclose(inputs["boxes"][0, 0].numpy(), expected.reshape(4), atol=1e-3)


def test_a_drawn_rectangle_lies_where_its_box_says(processor):
    image = Image.new("RGB", (120, 90), (0, 0, 0))
    image.paste((255, 255, 255), (30, 15, 90, 75))
    inputs = processor([image], ["<image><region>"], boxes=[[(30, 15, 90, 75)]])
    bright = inputs["pixel_values"][0, 0] > processor.normalise(np.full((1, 3, 1, 1), 128, np.uint8))[0, 0]
    rows, columns = bright.any(1).nonzero().flatten(), bright.any(0).nonzero().flatten()
    found = torch.tensor([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], dtype=torch.float32)
    assert (found - inputs["boxes"][0, 0]).abs().max() <= 1.0


def test_points_become_small_boxes_after_the_boxes(processor, noise_image):
    point = (40.0, 30.0)
    inputs = processor([noise_image()], ["<image><region> <region>"], boxes=[[BOX]], points=[[point]])
    frame = processor.frame((120, 90))
    expected, _ = frame.to_input(Boxes([BOX, *Points([point]).to_boxes()]))
    np.testing.assert_allclose(inputs["boxes"][0].numpy(), expected.xyxy, atol=1e-4)


def test_counts_that_do_not_agree_are_one_sentence(processor, noise_image):
    image = noise_image()
    cases = [
        (dict(images=[image], text=["<image><region>"], boxes=[[]]), "1 <region> placeholders and comes with 0 boxes"),
        (dict(images=[image], text=["<image>hello"], boxes=[[BOX]]), "0 <region> placeholders and comes with 1 boxes"),
        (dict(images=[image], text=["hello"]), "holds <image> once, this one 0 times"),
        (dict(images=[image], text=["<image>", "<image>"]), "2 prompts need as many pictures, got 1"),
        (dict(images=[image], text=["<image>"], boxes=[[], []]), "boxes holds 2 lists for 1 prompts"),
        (dict(text=["<image>"]), "speaks of a picture and none was given"),
        (
            dict(images=[image], text=["<image><region>"], boxes=[[(200, 100, 300, 200)]]),
            "outside the 120 x 90 picture",
        ),
        (dict(images=[image], text=["<image><region>"], boxes=[[(50, 9, 12, 45)]]), "box"),
    ]
    for arguments, message in cases:
        with pytest.raises(UserError) as error:
            processor(**arguments)
        assert message in str(error.value) and "\n" not in str(error.value)


def test_any_size_inputs_keep_the_aspect_ratio_and_close_each_row(make_tiny_mllm, noise_image):
    _, processor = make_tiny_mllm(row_end=True)
    wide = processor([noise_image(128, 44)], ["<image>"])
    assert wide["pixel_values"].shape == (1, 3, 24, 64)  # 44 * 64/128 = 22, rounded to a multiple of 8
    assert int((wide["input_ids"] == processor.image_token_id).sum()) == 3 * (8 + 1)
    with pytest.raises(UserError, match="one input size"):
        processor([noise_image(128, 44), noise_image(64, 64)], ["<image>", "<image>"], padding=True)


def test_parse_boxes_reads_what_write_wrote(processor):
    frame = processor.frame((120, 90))
    text = box_format(processor.box_format).write(Boxes([BOX]), frame)
    np.testing.assert_allclose(processor.parse_boxes(f"It is at {text}.", frame).boxes.xyxy, [BOX], atol=0.12)
