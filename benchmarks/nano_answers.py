"""A page of answers that nobody has chosen: random questions of every kind about random fresh scenes.

    regiontower bench nano-answers OUT.png [--model nano] [--count 24] [--seed 0]

Above each picture the question, the model's answer and what would have been right. Red boxes are asked about, green
ones are the model's.
"""

import argparse
import json
import random
import textwrap
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt

from regiontower.mllm import Question, answer_questions, load_mllm
from regiontower.mllm.boxes import Boxes, box_format
from regiontower.mllm.draw import draw_boxes
from regiontower.train_stages.conversation_kinds import KINDS
from regiontower.train_stages.conversations import render_turns, sample_conversation
from regiontower.train_stages.scenes import EVAL_SEED_START, generate_scene

COLUMNS = 6
ASKED, FOUND = "red", "lime"
FRESH = 500  # scenes of the evaluation seeds to draw from
LINE, LINES = 34, 3  # letters a line, lines a text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="PNG to write")
    parser.add_argument("--model", default="nano", help="packaged name, folder or hub id")
    parser.add_argument("--count", type=int, default=24, help="how many answers")
    parser.add_argument("--seed", type=int, default=0, help="of scenes and questions")
    arguments = parser.parse_args()
    model, processor = load_mllm(arguments.model)
    spoken, rng = box_format(processor.box_format), random.Random(arguments.seed)
    scenes, turns = [], []
    while len(turns) < arguments.count:
        scene = generate_scene(EVAL_SEED_START + rng.randrange(FRESH))
        frame = processor.frame(scene.image.size)
        drawn = sample_conversation(scene.record, rng, {rng.choice(list(KINDS)): 1.0}, turns=1)
        for turn in render_turns(drawn, spoken, frame):
            scenes.append(scene)
            turns.append(turn)
    questions = [Question(s.image, t.question, list(t.boxes)) for s, t in zip(scenes, turns, strict=True)]
    answers = answer_questions(model, processor, questions, max_new_tokens=160)

    matplotlib.use("Agg")
    rows = -(-len(turns) // COLUMNS)
    figure, axes = plt.subplots(rows, COLUMNS, figsize=(3 * COLUMNS, 4.4 * rows), squeeze=False, layout="constrained")
    for axis in axes.flat:
        axis.axis("off")
    for axis, scene, turn, answer in zip(axes.flat, scenes, turns, answers, strict=False):
        picture = draw_boxes(draw_boxes(scene.image, Boxes(list(turn.boxes)), (ASKED,)), answer.boxes.boxes, (FOUND,))
        axis.imshow(picture)
        lines = [("Q", turn.question), ("A", answer.text), ("=", turn.answer)]
        axis.set_title("\n".join(_short(f"{mark} {text}") for mark, text in lines), fontsize=8, loc="left")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(arguments.out, dpi=80)
    found = [{"question": t.question, "answer": a.text, "right": t.answer} for t, a in zip(turns, answers, strict=True)]
    print(json.dumps({"model": arguments.model, "answers": found}))


def _short(text: str) -> str:
    """Plain text in a few lines; a dollar sign would start a formula."""
    return "\n".join(textwrap.wrap(text.replace("$", r"\$"), LINE, max_lines=LINES, placeholder=" ..."))


if __name__ == "__main__":
    main()
