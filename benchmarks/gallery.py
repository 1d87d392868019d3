"""A page of pictures with true and predicted boxes, from an evaluation's samples.

    regiontower bench gallery EVAL_DIR OUT.png [--count 8] [--columns 4]

The rows are spread evenly over all that were asked: neither the first ones nor the flattering ones.
"""

import argparse
import json
import textwrap
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import Rectangle
from PIL import Image

from regiontower.eval.report import MODEL_COLOR, TRUE_COLOR
from regiontower.train_stages.images import open_image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("eval_dir", type=Path, help="folder that `regiontower eval` wrote")
    parser.add_argument("out", type=Path, help="picture to write")
    parser.add_argument("--count", type=int, default=8)
    parser.add_argument("--columns", type=int, default=4)
    arguments = parser.parse_args()

    lines = (arguments.eval_dir / "samples_regiontower_grounding.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    count = min(arguments.count, len(rows))
    chosen = [rows[index * len(rows) // count] for index in range(count)]
    height = -(-count // arguments.columns)
    figure, axes = plt.subplots(
        height, arguments.columns, figsize=(3.2 * arguments.columns, 3.7 * height), squeeze=False, layout="constrained"
    )
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, row in zip(axes.flat, chosen, strict=False):
        axis.imshow(open_image(row["image"]))
        for color, box in ((TRUE_COLOR, row["target"]), (MODEL_COLOR, row["predicted_xyxy"])):
            if box is not None:
                x1, y1, x2, y2 = box
                axis.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=color, linewidth=2.5))
        question = textwrap.fill(row["question"], 36)
        axis.set_title(f"{question}\nIoU {row['iou']:.2f}", fontsize=9)
    figure.suptitle("green: the true box, pink: the model's answer", fontsize=10)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(arguments.out, dpi=80)
    # Photographs as palette PNG: a third of the size, and nobody sees it at this scale.
    Image.open(arguments.out).convert("RGB").quantize(256, dither=Image.Dither.FLOYDSTEINBERG).save(arguments.out)
    print(json.dumps({"out": str(arguments.out), "pictures": count}))


if __name__ == "__main__":
    main()
