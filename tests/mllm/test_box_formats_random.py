"""The text conventions at random: the round trip within a quantum, and answers that are noise."""

import random
import time

import numpy as np
from box_examples import EXAMPLES, FRAME, assert_within_a_quantum, every_format
from hypothesis import given, settings
from hypothesis import strategies as st

from regiontower.mllm.boxes import BOX_FORMATS, Boxes, ImageFrame, box_format

UNIT = st.floats(0, 1, allow_subnormal=False)


@st.composite
def frames(draw):
    size = draw(st.tuples(st.integers(1, 3000), st.integers(1, 3000)))
    side = draw(st.integers(8, 600))
    kind = draw(st.sampled_from(["identity", "resize", "letterbox", "crop", "tiles"]))
    if kind == "identity":
        return ImageFrame.identity(size)
    if kind == "resize":
        return ImageFrame.resize(size, (side, draw(st.integers(8, 600))))
    if kind == "letterbox":
        return ImageFrame.letterbox(size, side)
    if kind == "tiles":
        return draw(st.sampled_from(ImageFrame.tiles(size, (draw(st.integers(1, 4)), draw(st.integers(1, 4))), side)))
    x1, y1 = draw(st.floats(-0.5, 0.9)) * size[0], draw(st.floats(-0.5, 0.9)) * size[1]
    x2 = max(x1, 0) + (0.05 + draw(UNIT)) * size[0]
    y2 = max(y1, 0) + (0.05 + draw(UNIT)) * size[1]
    return ImageFrame.crop(size, (x1, y1, x2, y2), (side, draw(st.integers(8, 600))))


@given(st.data())
@settings(max_examples=150, deadline=None, derandomize=True)
def test_original_to_text_and_back_is_within_one_quantum(data):
    frame = data.draw(frames())
    width, height = frame.original_size
    rows = []
    for _ in range(data.draw(st.integers(1, 4))):
        (x1, x2), (y1, y2) = (sorted((data.draw(UNIT), data.draw(UNIT))) for _ in range(2))
        rows.append([x1 * width, y1 * height, x2 * width, y2 * height])
    # What the model saw: through the input and back, as a training sample is made.
    seen, kept = frame.to_input(Boxes(rows))
    expected = frame.to_original(seen)
    wide_enough = (expected.xyxy[:, 2:] - expected.xyxy[:, :2] > 1e-6).all(axis=1)
    for name in BOX_FORMATS:
        parsed = box_format(name).parse(box_format(name).write(Boxes(rows), frame), frame)
        assert parsed.status == ("boxes" if len(kept) else "none")
        assert len(parsed.boxes) == len(kept)
        assert_within_a_quantum(parsed.boxes, expected, name, frame)
        assert (parsed.boxes.area[wide_enough] > 0).all()
        assert (parsed.boxes.xyxy >= 0).all() and (parsed.boxes.xyxy <= np.tile(frame.original_size, 2)).all()


NOISE = [
    *"[](){}<>|,;:.-+ \n\t\"'/_#eE0123456789",
    *"٣３९①½∞−\u200b\ufeff\x00é猫",
    *["nan", "inf", "-inf", "1e308", "NaN", "Infinity", "null", "true", "none", "9" * 25, "1" * 5000, "0.", ".5", "-0"],
    *["[[", "]]", "[[[[", "<box>", "</box>", "<|det|>", "<|/det|>", "<|box_start|>", "<|box_end|>", "```json"],
    *["<patch_index_", "<patch_index_9999>", "<patch_index_0000>", "</object>", '"bbox_2d":', "\\", "\\u0000", "1001"],
]


def mutate(text: str, rng: random.Random) -> str:
    for _ in range(rng.randint(1, 6)):
        at, to = rng.randint(0, len(text)), rng.randint(0, len(text))
        low, high = min(at, to), min(max(at, to), min(at, to) + 12)
        kind = rng.choice(["insert", "delete", "swap", "replace", "double", "digit"])
        if kind == "insert":
            text = text[:at] + rng.choice(NOISE) + text[at:]
        elif kind == "delete":
            text = text[:low] + text[high:]
        elif kind == "swap" and high > low:
            text = text[:low] + text[low:high][::-1] + text[high:]
        elif kind == "double":
            text = text[:high] + text[low:high] + text[high:]
        elif kind == "digit":
            text = text[:at] + rng.choice("0123456789") + text[at + 1 :]
        else:
            text = text[:at] + rng.choice(NOISE) + text[at + 1 :]
    return text


@every_format
def test_ten_thousand_mutated_answers_never_raise_and_never_leave_the_image(name):
    rng = random.Random(f"mutations of {name}")
    fmt, statuses = box_format(name), []
    for _ in range(1000):
        size = (rng.randint(1, 2000), rng.randint(1, 2000))
        frame = rng.choice([ImageFrame.letterbox(size, 112), ImageFrame.tiles(size, (2, 2), 56)[3]])
        (x1, y1, x2, y2), count = frame.visible_xyxy, rng.randint(1, 3)
        label = rng.choice([None, "a cat"])
        text = mutate(fmt.write(Boxes([[x1, y1, x2, y2]] * count), frame, [label] * count), rng)
        parsed = fmt.parse(text, frame)
        statuses.append(parsed.status)
        boxes = parsed.boxes.xyxy
        assert (boxes >= 0).all() and (boxes <= np.tile(size, 2)).all() and np.isfinite(boxes).all()
        assert (parsed.status == "boxes") == (len(boxes) > 0) and len(parsed.spans) == len(boxes)
        assert all(0 <= start < end <= len(text) for start, end in parsed.spans)
    # The mutations are neither all harmless nor all fatal.
    assert statuses.count("boxes") > 20 and statuses.count("malformed") > 200


@every_format
def test_long_answers_take_linear_time(name):
    example = EXAMPLES[name]
    pieces = ["[", "]", "[[", "(", "0", "1,", "[1,", "<", "<box>", "<|det|>", "<|box_start|>(", "<patch_index_", " "]
    pieces += [
        '"bbox_2d":',
        '[{"a":',
        "<|det|>[",
        "<|det|>[[1,2,3,4],",
        "[1,2,3,4;",
        example,
        example[:-1],
        example[1:],
    ]
    start = time.process_time()
    for piece in pieces:
        for around in [
            "{}",
            "<|det|>[[{}]]<|/det|>",
            "<box>{}</box>",
            "<|box_start|>({}<|box_end|>",
            '[{{"bbox_2d":{}}}]',
        ]:
            box_format(name).parse(around.format(piece * (100_000 // len(piece))), FRAME)
    # 105 texts take about a second; one quadratic scan of 100,000 characters alone takes many.
    assert time.process_time() - start < 20
