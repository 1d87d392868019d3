"""One question about one picture file: what `regiontower chat` does."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .mllm import Question, answer_questions, load_mllm
from .mllm.boxes import Boxes
from .mllm.draw import draw_boxes
from .mllm.prompts import LOCATE, REGION_TOKEN, sought_phrase
from .train_stages.images import open_image
from .vision_towers import UserError

ASKED, FOUND = "red", "lime"  # colours of the user's boxes and of the answer's


def ask_picture(
    model: str | Path,
    image: str | Path,
    question: str,
    boxes: Sequence[str] = (),
    *,
    out: str | Path | None = None,
    max_new_tokens: int = 128,
    device: str = "auto",
    dtype: str = "auto",
    quant: str = "none",
) -> dict[str, Any]:
    """Answer, and draw the boxes on the picture when `out` is given.

    Args:
        boxes: "x1,y1,x2,y2" each, in pixels of the picture (after EXIF transpose). A question without `<region>`
            gets one a box at its end. "Find the X" is asked as "Where is X?".
        device, dtype, quant: as of `load_mllm`.
    Returns:
        `{"answer", "boxes": [{"box_xyxy", "score"}], "status"}`; status is "boxes", "none" or "malformed".
    Raises:
        UserError: a picture, box or model that cannot be used.
    """
    picture = open_image(image)
    asked = parse_boxes(boxes, picture.size)
    if len(asked) and REGION_TOKEN not in question:
        question = f"{question} {' '.join([REGION_TOKEN] * len(asked))}"
    if REGION_TOKEN not in question and (phrase := sought_phrase(question)):
        question = LOCATE.format(phrase=phrase)  # in the words that models here are trained on
    if out is not None and Path(out).suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise UserError(f"--out {out} must end in .png, .jpg or .webp.")
    network, processor = load_mllm(model, device=device, dtype=dtype, quant=quant)
    answer = answer_questions(network, processor, [Question(picture, question, asked)], max_new_tokens=max_new_tokens)[
        0
    ]
    found = answer.boxes
    if out is not None:
        drawn = draw_boxes(picture, asked, (ASKED,))
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        draw_boxes(drawn, found.boxes, (FOUND,)).save(out)
    rows = [
        {"box_xyxy": [round(edge, 2) for edge in box], "score": round(score, 4)}
        for box, score in zip(found.boxes, found.scores or [], strict=True)
    ]
    return {"answer": answer.text, "boxes": rows, "status": found.status}


def parse_boxes(texts: Sequence[str], size: tuple[int, int]) -> Boxes:
    """ "x1,y1,x2,y2" strings as boxes inside a picture of `size = (width, height)`."""
    width, height = size
    rows = []
    for text in texts:
        try:
            x1, y1, x2, y2 = (float(part) for part in text.replace(" ", "").split(","))
        except ValueError:
            raise UserError(f"--box {text!r} is not x1,y1,x2,y2 in pixels.") from None
        if not (0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height):
            raise UserError(f"--box {text!r} is not a box inside the {width} x {height} picture (x1 < x2, y1 < y2).")
        rows.append((x1, y1, x2, y2))
    return Boxes(rows)
