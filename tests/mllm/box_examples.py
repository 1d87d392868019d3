"""One box in every text convention, and how close to it a box that was read has to be."""

import numpy as np
import pytest

from regiontower.mllm.boxes import BOX_FORMATS, Boxes, ImageFrame, box_format

# A 200 x 100 image in a 100 x 100 letterbox, and this box. By hand: the padded square is 200 x 200 with 50 rows on top;
# the input holds the image at half size, 25 rows down.
SIZE, FRAME, BOX = (200, 100), ImageFrame.letterbox((200, 100), 100), (20, 10, 120, 60)
EXAMPLES = {
    "norm01": "[0.10, 0.30, 0.60, 0.55]",
    "shikra": "[0.100,0.300,0.600,0.550]",
    "square100": "[10,30,60,55]",
    "int1000": "[100, 100, 600, 600]",
    "qwen2": "<|box_start|>(100,100),(600,600)<|box_end|>",
    "qwen2_5_json": '[{"bbox_2d": [10, 30, 60, 55]}]',
    "qwen3_json": '[{"bbox_2d": [100, 100, 600, 600]}]',
    "deepseek_det": "<|det|>[[100, 100, 599, 599]]<|/det|>",
    "internvl_box": "<box>[[100, 100, 600, 600]]</box>",
    # columns 3.2..19.2 -> 3..19, rows 9.6..17.6 -> 9..17 of 32
    "kosmos_patch": "<patch_index_0291><patch_index_0563>",
    "pixel": "[20, 10, 120, 60]",
}
every_format = pytest.mark.parametrize("name", BOX_FORMATS)


def assert_within_a_quantum(parsed: Boxes, expected: Boxes, name: str, frame: ImageFrame) -> None:
    quantum = np.tile(box_format(name).quantum(frame), 2)
    assert (np.abs(parsed.xyxy - expected.xyxy) <= quantum * (1 + 1e-6) + 1e-6).all()
