"""RegionLlavaNext: plain LLaVA-NeXT without boxes, and each box read from the view that shows it best."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaNextImageProcessor, LlavaNextProcessor

from regiontower.benchmarks._tiny_llavas import SIDE, tiny_llava, tiny_tower
from regiontower.mllm import (
    ChatSession,
    Question,
    RegionLlavaNextForConditionalGeneration,
    RegionLlavaNextProcessor,
    add_regions,
    answer_questions,
    export_mllm_remote_code,
    load_mllm,
    swap_vision_tower,
    to_plain_llava,
)
from regiontower.mllm.answers import model_inputs, user_prompt
from regiontower.mllm.boxes import Boxes, ImageFrame
from regiontower.mllm.tiles import stack_in_views, tiled_tokens, view_frames, views_of_rows
from regiontower.vision_towers import RiceVisionModel, RoiVisionModel, UserError

READER = """
import sys
from pathlib import Path
sys.modules["regiontower"] = None  # importing it raises ImportError
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

folder, here = Path(sys.argv[1]), Path(sys.argv[2])
asked = torch.load(here / "asked.pt")
model, info = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
inputs = processor([Image.open(here / "picture.png")], [asked["prompt"]], boxes=[asked["boxes"]])
taken = {name: inputs[name] for name in asked["inputs"] if name != "token_type_ids"}
assert all(torch.equal(taken[name], asked["inputs"][name]) for name in taken)
with torch.no_grad():
    assert torch.equal(model.eval()(**taken).logits, asked["logits"])
"""
SIZES = [(130, 90), (40, 200), (300, 64)]
BOXES = [[(5, 5, 30, 30), (2, 2, 125, 88), (100, 60, 128, 88)], [], [(10, 10, 60, 50)]]
TEXTS = ["<region> <region> or <region> ?", "What is in the picture ?", "What is in <region> ?"]
REAL_POINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]


@pytest.fixture(scope="module")
def made():
    return add_regions(*swap_vision_tower(*tiny_llava("LlavaNext"), tiny_tower("RICE")))


@pytest.fixture(scope="module")
def batch(made, noise_image):
    _, processor = made
    pictures = [noise_image(*size, seed=seed) for seed, size in enumerate(SIZES)]
    prompts = [user_prompt(processor, text) for text in TEXTS]
    return pictures, processor(pictures, prompts, boxes=BOXES, padding=True, padding_side="left")


@pytest.fixture(scope="module")
def real_processor():
    """LLaVA-NeXT's own, with the grids of the published checkpoints."""
    return LlavaNextProcessor(
        LlavaNextImageProcessor(image_grid_pinpoints=REAL_POINTS),
        tiny_llava("LlavaNext")[1].tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


@given(width=st.integers(8, 3000), height=st.integers(8, 3000))
def test_tokens_are_counted_as_llava_next_does(real_processor, width, height):
    counted = real_processor._get_number_of_features(height, width, 336, 336) - 1
    assert tiled_tokens((width, height), REAL_POINTS, 336, 14) == counted


@pytest.mark.parametrize("size", [(130, 90), (40, 200), (300, 64), (56, 56), (111, 113)])
def test_a_rectangle_lies_in_every_view_where_the_frames_say(made, size):
    """Draws a box, lets LLaVA-NeXT's own image processor make the views, and looks for the box in each."""
    _, processor = made
    width, height = size
    box = (width * 0.3, height * 0.25, width * 0.75, height * 0.7)
    drawn = tuple(round(edge) for edge in box)
    image = Image.new("RGB", size, (0, 0, 0))
    image.paste((255, 255, 255), drawn)
    views, frames = processor.pixels(image), processor.views(size)
    assert len(views) == len(frames) and sum(frame is not None for frame in frames) > 1
    seen = 0
    for view, frame in zip(views, frames, strict=True):
        bright = view[0] > 127
        there, kept = frame.to_input(Boxes([drawn])) if frame is not None else (Boxes.empty(), [])
        if not len(kept):
            assert not bright.any()
            continue
        if not bright.any():  # less than half a pixel of it
            assert min(there[0][2] - there[0][0], there[0][3] - there[0][1]) < 1.0
            continue
        rows, columns = bright.any(1).nonzero()[0], bright.any(0).nonzero()[0]
        found = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
        np.testing.assert_allclose(found, there[0], atol=1.0)
        seen += 1
    assert seen > 1


def test_a_box_is_read_from_the_tile_that_holds_it_and_a_large_one_from_the_whole():
    size, points = (112, 112), [[112, 112]]
    frames = view_frames(size, points, SIDE)  # four tiles, each shows a quarter at twice the size
    boxes = Boxes([(60, 4, 100, 50), (4, 60, 50, 112), (40, 40, 80, 80), (0, 0, 112, 112), (30, 0, 30, 0)])
    stacked = stack_in_views(boxes, frames, SIDE)
    rows = torch.tensor(stacked.xyxy)
    assert views_of_rows(rows, SIDE).tolist() == [2, 3, 0, 0, 0]
    np.testing.assert_allclose(stacked[0], (4, 4 + 2 * SIDE, 44, 50 + 2 * SIDE))
    np.testing.assert_allclose(stacked[1], (4, 4 + 3 * SIDE, 50, 56 + 3 * SIDE))
    np.testing.assert_allclose(stacked[2], (20, 20, 40, 40))


@given(
    width=st.integers(20, 900),
    height=st.integers(20, 900),
    corners=st.tuples(*[st.floats(0, 1) for _ in range(4)]),
)
def test_every_box_lies_inside_its_view_and_comes_back(width, height, corners):
    (x1, x2), (y1, y2) = sorted(corners[:2]), sorted(corners[2:])
    box = (x1 * width, y1 * height, x2 * width, y2 * height)
    frames = view_frames((width, height), REAL_POINTS, 336)
    stacked = stack_in_views(Boxes([box]), frames, 336)
    row = stacked.tensor()
    view = int(views_of_rows(row, 336)[0])
    frame = frames[view]
    assert frame is not None
    inside = row[0].numpy() - np.array([0, view * 336, 0, view * 336])
    assert (inside > -1e-3).all() and (inside < 336 + 1e-3).all()
    back = frame.to_original(Boxes([np.maximum(inside, 0)]))[0]
    np.testing.assert_allclose(back, box, atol=0.02 * max(width, height) / 100 + 1e-3)


@pytest.mark.parametrize("tower", ["CLIP", "SigLIP", "RICE", "DINOv3"])
def test_without_boxes_it_is_plain_llava_next_to_the_bit(tower, noise_image):
    """Pixels, text and logits are those of LLaVA-NeXT's own processor and model."""
    plain, theirs = swap_vision_tower(*tiny_llava("LlavaNext"), tiny_tower(tower))
    pictures = [noise_image(*size, seed=3) for size in SIZES]
    prompts = [f"USER: {theirs.image_token} What is in the picture ?"] * len(SIZES)
    expected = theirs(images=pictures, text=prompts, return_tensors="pt", padding=True, padding_side="left")
    with torch.no_grad():
        logits = plain(**expected).logits
    model, processor = add_regions(plain, theirs)
    assert isinstance(model, RegionLlavaNextForConditionalGeneration)
    assert isinstance(processor, RegionLlavaNextProcessor)
    assert isinstance(model.model.vision_tower, RiceVisionModel if tower == "RICE" else RoiVisionModel)
    inputs = processor(pictures, prompts, padding=True, padding_side="left")
    for name in ("input_ids", "attention_mask", "pixel_values", "image_sizes"):
        assert torch.equal(inputs[name], expected[name]), name
    with torch.no_grad():
        assert torch.equal(model(**model_inputs(model, inputs)).logits, logits)


def test_region_rows_are_the_towers_of_their_view_in_placeholder_order(made, batch):
    model, _ = made
    _, inputs = batch
    with torch.no_grad():
        rows = model.model.get_image_features(
            inputs["pixel_values"],
            inputs["image_sizes"],
            boxes=inputs["boxes"],
            region_counts=inputs["region_counts"],
        ).region_embeds
        expected = []
        for picture, count in enumerate(inputs["region_counts"].tolist()):
            for box in inputs["boxes"][picture, :count]:
                view = int(views_of_rows(box, SIDE))
                inside = box - torch.tensor([0.0, view * SIDE, 0.0, view * SIDE])
                pixels = inputs["pixel_values"][picture, view][None]
                expected.append(model.model.vision_tower(pixels, boxes=inside[None, None]).region_embeds[0, 0])
        views = views_of_rows(inputs["boxes"][0], SIDE).tolist()
    assert len(set(views)) == 3  # of one picture, so that the order of views is not that of the boxes
    torch.testing.assert_close(rows, model.model.region_projector(torch.stack(expected)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("use_cache", [True, False])
def test_batched_generation_equals_one_by_one(made, batch, beams, use_cache):
    model, processor = made
    pictures, inputs = batch
    options = {"max_new_tokens": 6, "num_beams": beams, "do_sample": False, "use_cache": use_cache}
    together = model.generate(**model_inputs(model, inputs), **options)[:, inputs["input_ids"].shape[1] :]
    for row, (picture, text, boxes) in enumerate(zip(pictures, TEXTS, BOXES, strict=True)):
        single = processor([picture], [user_prompt(processor, text)], boxes=[boxes])
        alone = model.generate(**model_inputs(model, single), **options)[0, single["input_ids"].shape[1] :]
        assert together[row].tolist() == alone.tolist()


def test_chat_keeps_its_prefix_and_reads_later_boxes_from_the_right_view(made, noise_image):
    model, processor = made
    picture = noise_image(*SIZES[0])
    calls: list[int] = []
    handle = model.model.vision_tower.encoder.layers[0].register_forward_hook(lambda *_: calls.append(1))
    session = ChatSession(model, processor, picture, max_new_tokens=4)
    boxes: list[tuple[int, ...]] = []
    turns = (("What is in <region> ?", BOXES[0][:1]), ("<region> or <region> ?", BOXES[0][1:]))
    for text, new in turns:
        boxes += new
        answer = session.ask(text, new)
        end = session._prefix.ids.shape[1] - len(session.last_answer_ids)
        ids = session._prefix.ids[:, :end]
        assert calls == [1]  # the tower's first block runs once a conversation
    handle.remove()
    inputs = processor([picture], ["<image>" + "<region>" * len(boxes)], boxes=[boxes])
    given = {name: inputs[name] for name in ("pixel_values", "image_sizes", "boxes", "region_counts")}
    output = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **given, max_new_tokens=4)
    assert output[0, end:].tolist()[: len(session.last_answer_ids)] == session.last_answer_ids
    assert isinstance(answer.text, str)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_survives_saving_and_answers(dtype, noise_image, tmp_path):
    model, processor = add_regions(*swap_vision_tower(*tiny_llava("LlavaNext", dtype), tiny_tower("SigLIP")))
    for part in (model, processor):
        part.save_pretrained(tmp_path)
    again, opened = load_mllm(tmp_path, device="cpu")
    assert isinstance(opened, RegionLlavaNextProcessor) and again.dtype == dtype
    inputs = opened([noise_image(*SIZES[0])], [user_prompt(opened, TEXTS[2])], boxes=[[(5, 5, 60, 60)]])
    moved = opened([noise_image(*SIZES[0])], [user_prompt(opened, TEXTS[2])], boxes=[[(60, 30, 120, 80)]])
    with torch.no_grad():
        logits = model(**model_inputs(model, inputs)).logits
        weights = again.state_dict()
        assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
        # Where weights lie in memory shows in the last bits on some processors.
        torch.testing.assert_close(again(**model_inputs(again, inputs)).logits, logits)
        other = inputs | {"boxes": moved["boxes"]}
        assert not torch.allclose(again(**model_inputs(again, other)).logits[0, -1], logits[0, -1], atol=1e-3)
    questions = [
        Question(noise_image(*size), text, boxes) for size, text, boxes in zip(SIZES, TEXTS, BOXES, strict=True)
    ]
    answers = answer_questions(again, opened, questions, max_new_tokens=3)
    assert len(answers) == 3 and all(isinstance(answer.text, str) for answer in answers)


@pytest.mark.parametrize("text", ["What is in <region> ?", "What is in the picture ?", None])
def test_every_part_gets_a_gradient_whatever_the_batch_holds(made, noise_image, text):
    """A rank whose batch has no region, or no picture, must not leave others waiting for its gradients."""
    model, processor = made
    boxes = None if text is None or "<region>" not in text else [[(5, 5, 60, 60)]]
    if text is None:
        inputs = processor(text=["What is it ?"])
    else:
        inputs = processor([noise_image(*SIZES[0])], [user_prompt(processor, text)], boxes=boxes)
    model.train()
    try:
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        bare = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    finally:
        model.zero_grad()
        model.eval()
    # Behind the feature layer only the region stream runs on; its last block's class token ends there.
    assert not [name for name in bare if "vision_tower" not in name], bare
    assert not any("layers.0" in name for name in bare)


def test_mistakes_are_one_line(made, noise_image):
    model, processor = made
    picture = noise_image(*SIZES[0])
    with pytest.raises(UserError, match="outside the 130 x 90 picture"):
        processor([picture], ["<image><region>"], boxes=[[(200, 100, 220, 120)]])
    inputs = processor([picture], ["<image><region>"], boxes=[[(5, 5, 60, 60)]])
    below = inputs["boxes"] + torch.tensor([0.0, 9 * SIDE, 0.0, 9 * SIDE])
    with pytest.raises(UserError, match="below its picture's last view") as error:
        model(**inputs | {"boxes": below})
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="must be float32"):
        model(**inputs | {"boxes": inputs["boxes"].half()})
    with pytest.raises(UserError, match="holds 1 <region> placeholders"):
        model(**{name: inputs[name] for name in ("input_ids", "attention_mask", "pixel_values", "image_sizes")})
    processor = RegionLlavaNextProcessor(processor.image_processor, processor.tokenizer, patch_size=14, image_size=84)
    with pytest.raises(UserError, match="must fit image_size 84"):
        processor.pixels(picture)


def test_it_can_be_given_back_to_plain_llava_next(made, batch, noise_image, tmp_path):
    model, processor = made
    to_plain_llava(model, processor, tmp_path)
    plain, info = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    theirs = AutoProcessor.from_pretrained(tmp_path)
    assert type(plain).__module__.startswith("transformers.") and type(theirs) is LlavaNextProcessor
    text = user_prompt(processor, "What is in the picture ?")
    inputs = processor([noise_image(*SIZES[0])], [text])
    again = theirs(images=[noise_image(*SIZES[0])], text=[text], return_tensors="pt")
    assert torch.equal(inputs["pixel_values"], again["pixel_values"])
    with torch.no_grad():
        assert torch.equal(plain(**again).logits, model(**model_inputs(model, inputs)).logits)


def test_a_tower_with_registers_is_not_given_back(tmp_path):
    pair = add_regions(*swap_vision_tower(*tiny_llava("LlavaNext"), tiny_tower("DINOv3")))
    with pytest.raises(UserError, match="would see other image tokens") as error:
        to_plain_llava(*pair, tmp_path / "out")
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_it_opens_by_its_own_code(made, noise_image, tmp_path):
    model, processor = made
    for part in made:
        part.save_pretrained(tmp_path / "saved")
    folder = export_mllm_remote_code(tmp_path / "saved", tmp_path / "exported")
    inputs = processor([noise_image(*SIZES[0])], [user_prompt(processor, TEXTS[0])], boxes=[BOXES[0]])
    with torch.no_grad():
        expected = {"logits": model(**model_inputs(model, inputs)).logits, "inputs": dict(inputs)}
    torch.save({**expected, "boxes": BOXES[0], "prompt": user_prompt(processor, TEXTS[0])}, tmp_path / "asked.pt")
    noise_image(*SIZES[0]).save(tmp_path / "picture.png")
    done = subprocess.run(
        [sys.executable, "-c", READER, str(folder), str(tmp_path)], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "tiles of it" in (folder / "README.md").read_text()


def test_coordinates_in_text_lie_in_the_whole_picture(made):
    _, processor = made
    frame = processor.frame((200, 100))
    assert frame == ImageFrame.resize((200, 100), (SIDE, SIDE))
    parsed = processor.parse_boxes("at [100, 200, 500, 1000]", frame)
    np.testing.assert_allclose(parsed.boxes[0], (20, 20, 100, 100))
