"""A page of answers that nobody has chosen: random questions of every kind about random fresh scenes.

    regiontower bench nano-answers OUT.png [--model nano] [--count 24] [--seed 0]

Above each picture the question, the model's answer and what would have been right. Red boxes and circles are asked
about, green boxes are the model's. What is printed counts the answers that are right: the expected text, or for boxes
the expected words between them and every box found.
"""

import argparse
import json
import random
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import matplotlib.pyplot as plt
from matplotlib.patheffects import withStroke
from PIL import Image

from regiontower.eval.box_sets import score_set
from regiontower.mllm import Answer, Question, answer_questions, load_mllm
from regiontower.mllm.boxes import Boxes, ParsedBoxes, box_format
from regiontower.mllm.draw import draw_boxes
from regiontower.mllm.prompts import POINT
from regiontower.train_stages.conversation_kinds import KINDS
from regiontower.train_stages.conversations import RenderedTurn, render_turns, sample_conversation
from regiontower.train_stages.scenes import EVAL_SEED_START, generate_scene

COLUMNS = 6
ASKED, FOUND = "red", "lime"
FRESH = 500  # scenes of the evaluation seeds to draw from, each at most once
LETTERS = 38  # a line
SIDE, LINE = 3.0, 0.16  # inches: of a picture's square, of a line of text


class _Cell(NamedTuple):
    """One picture and what stands above it; `point` (pixels) is asked about."""

    picture: Image.Image
    text: str
    point: tuple[float, float] | None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="PNG to write")
    parser.add_argument("--model", default="nano", help="packaged name, folder or hub id")
    parser.add_argument("--count", type=int, default=24, help="how many answers")
    parser.add_argument("--seed", type=int, default=0, help="of scenes and questions")
    arguments = parser.parse_args()
    model, processor = load_mllm(arguments.model)
    spoken, rng = box_format(processor.box_format), random.Random(arguments.seed)
    pictures, turns, truths = [], [], []
    for seed in rng.sample(range(EVAL_SEED_START, EVAL_SEED_START + FRESH), FRESH):
        if len(turns) >= arguments.count:
            break
        scene = generate_scene(seed)
        frame = processor.frame(scene.image.size)
        drawn = sample_conversation(scene.record, rng, {rng.choice(list(KINDS)): 1.0}, turns=1)
        for turn in render_turns(drawn, spoken, frame):
            pictures.append(scene.image)
            turns.append(turn)
            truths.append(spoken.parse(turn.answer, frame))
    questions = [Question(p, t.question, list(t.boxes)) for p, t in zip(pictures, turns, strict=True)]
    answers = answer_questions(model, processor, questions, max_new_tokens=160)

    _draw_page([_cell(*row) for row in zip(pictures, turns, answers, strict=True)], arguments.out)
    found = [
        {"question": t.question, "answer": a.text, "expected": t.answer, "correct": is_right(a, t.answer, truth)}
        for t, a, truth in zip(turns, answers, truths, strict=True)
    ]
    print(json.dumps({"model": arguments.model, "answers": found, "right": sum(row["correct"] for row in found)}))


def is_right(answer: Answer, expected: str, truth: ParsedBoxes) -> bool:
    """Whether the answer is the expected text; of boxes, whether all of `truth` are found, none is too many, and the
    words between them are the expected ones."""
    if truth.status != "boxes":
        return answer.text.strip() == expected.strip()
    return score_set(answer.boxes, list(truth.boxes)).exact and _words(answer.text) == _words(expected)


def _words(text: str) -> str:
    """Without the numbers of boxes."""
    return re.sub(r"\d+(\.\d+)?", "", text).strip()


def _cell(image: Image.Image, turn: RenderedTurn, answer: Answer) -> _Cell:
    asked, point = Boxes(list(turn.boxes)), None
    if turn.question == POINT:  # its box is too small to be seen
        ((x1, y1, x2, y2),) = asked
        asked, point = Boxes.empty(), ((x1 + x2) / 2, (y1 + y2) / 2)
    picture = draw_boxes(draw_boxes(image, asked, (ASKED,)), answer.boxes.boxes, (FOUND,))
    lines = (("Q", turn.question), ("A", answer.text), ("=", turn.answer))
    text = "\n".join(textwrap.fill(f"{mark} {what}", LETTERS) for mark, what in lines)
    return _Cell(picture, text, point)


def _draw_page(cells: Sequence[_Cell], path: Path) -> None:
    """A row of texts, as high as its longest, over each row of pictures: nothing is cut off or abbreviated."""
    matplotlib.use("Agg")
    rows = [cells[start : start + COLUMNS] for start in range(0, len(cells), COLUMNS)]
    heights = [h for row in rows for h in (LINE * (2 + max(cell.text.count("\n") for cell in row)), SIDE)]
    size = (SIDE * COLUMNS, sum(heights))
    figure, axes = plt.subplots(
        len(heights), COLUMNS, figsize=size, squeeze=False, gridspec_kw={"height_ratios": heights}
    )
    figure.subplots_adjust(left=0.003, right=0.997, bottom=0, top=1, wspace=0.04, hspace=0)
    for axis in axes.flat:
        axis.axis("off")
    for number, cell in enumerate(cells):
        row, column = divmod(number, COLUMNS)
        above, axis = axes[2 * row : 2 * row + 2, column]
        above.text(0, 0, cell.text, fontsize=8, va="bottom", parse_math=False)
        axis.imshow(cell.picture)
        axis.set_anchor("NW")
        if cell.point:
            ring = {"markersize": 14, "markerfacecolor": "none", "markeredgecolor": ASKED, "markeredgewidth": 2}
            outline = [withStroke(linewidth=4, foreground="white")]
            axis.plot(*cell.point, "o", path_effects=outline, clip_on=False, **ring)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)


if __name__ == "__main__":
    main()
