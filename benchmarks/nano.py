"""What the packaged models can do: the tasks on fresh scenes, words never seen, and the ceilings of their towers.

    regiontower bench nano --out DIR [--limit 2000] [--model NAME=FOLDER ...] --json

Scenes of the evaluation seeds, preset `default`; all models in float32. `--model` adds a row beside `nano` and
`nano-clip`, for instance one whose tower was not frozen. Regions are read out of the towers in their own way, and by
RoIAlign on the value path of the last block, which is how regions are commonly read out of a CLIP.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from regiontower.benchmarks._command import typed
from regiontower.benchmarks._stamp import stamp
from regiontower.eval.baselines import trivial_baselines
from regiontower.eval.ceiling import CeilingConfig, supervised_ceiling
from regiontower.eval.run import evaluate
from regiontower.mllm.boxes import mean_colour
from regiontower.train_stages.pixels import PixelCache
from regiontower.train_stages.record_io import read_records
from regiontower.train_stages.scenes import EVAL_SEED_START, write_scenes
from regiontower.vision_towers import describe_tower, load_tower
from regiontower.vision_towers.packaged import model_source

SCENES = 500
HEAD_SCENES = 6_000  # from which the supervised heads of the ceiling learn
MODELS = ("nano", "nano-clip")
READOUTS = ("own", "value")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for scenes and evaluations")
    parser.add_argument("--limit", type=int, default=2000, help="rows a task")
    parser.add_argument("--scenes", type=int, default=SCENES, help="evaluation scenes")
    parser.add_argument("--head-scenes", type=int, default=HEAD_SCENES, help="scenes that supervised heads learn from")
    parser.add_argument("--model", action="append", default=[], metavar="NAME=FOLDER", help="one more row")
    parser.add_argument("--json", action="store_true", help="the result alone on the last line")
    arguments = parser.parse_args()
    out: Path = arguments.out
    seen = write_scenes(out / "seen", arguments.scenes, EVAL_SEED_START)
    unseen = write_scenes(out / "unseen", arguments.scenes, EVAL_SEED_START, words="unseen")
    heads = write_scenes(out / "heads", arguments.head_scenes, 0)

    models = {name: name for name in MODELS} | dict(pair.split("=", 1) for pair in arguments.model)
    rows: dict[str, Any] = {}
    for name, source in models.items():
        tasks = evaluate(source, seen, out=out / f"eval-{name}", limit=arguments.limit, dtype="fp32").tasks
        unseen_out = out / f"eval-{name}-unseen"
        words = evaluate(source, unseen, ["reading"], unseen_out, limit=arguments.limit, dtype="fp32").tasks
        rows[name] = {**tasks, "unseen_words_reading": words["regiontower_reading"]}
        rows[name]["ceiling"] = ceiling(source, heads, seen, out / "pixels")
    arguments.model = [f"{name}=RUN" for name in models if name not in MODELS]  # paths are nobody's business
    results = {
        "command": typed("nano", parser, arguments),
        "scenes": arguments.scenes,
        "models": rows,
        "trivial": trivial_baselines(seen, train=heads, limit=arguments.limit),
        **stamp({name: Path(model_source(source)) for name, source in models.items()}),
    }
    print(json.dumps(results) if arguments.json else json.dumps(results, indent=2))


def ceiling(source: str, train: Path, test: Path, cache: Path) -> dict[str, float]:
    """`supervised_ceiling` of the tower in a model."""
    tower = load_tower(source, dtype=torch.float32)
    spec = describe_tower(tower.config)
    fill = mean_colour(spec.image_mean)
    pixels = [PixelCache.build(read_records(path), spec.image_size, cache, fill=fill) for path in (train, test)]
    return supervised_ceiling(tower, *pixels, CeilingConfig(readouts=READOUTS))


if __name__ == "__main__":
    main()
