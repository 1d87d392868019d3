"""Photographs and receipts: `align-real`, `instruct-real`, then the held-out parts, beside trivial answers.

    regiontower bench real-data --data DATA --tower RUN --language-model RUN --out DIR --json

DATA holds `natural/{train,val}.jsonl` and `ocr/{train,val}.jsonl` in the `xywh_jsonl` layout.
"""

import argparse
import json
from pathlib import Path

from regiontower.benchmarks._stamp import stamp
from regiontower.eval.baselines import trivial_baselines
from regiontower.eval.run import evaluate
from regiontower.train_stages.mllm_stage import AlignRecipe, InstructRecipe, align, instruct
from regiontower.train_stages.recipe import load_recipe

PARTS = ("natural", "ocr")
FORMAT = "xywh_jsonl"
COMMAND = "regiontower bench real-data --data DATA --tower TOWER --language-model LM --out OUT"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the parts")
    parser.add_argument("--tower", type=Path, required=True, help="a stage-0 run")
    parser.add_argument("--language-model", type=Path, required=True, help="a stage-0b run")
    parser.add_argument("--out", type=Path, required=True, help="folder for runs and evaluations")
    parser.add_argument("--limit", type=int, help="at most so many rows a task and part; all when absent")
    parser.add_argument("--set", dest="sets", action="append", default=[], help="override a key of instruct-real")
    parser.add_argument("--json", action="store_true", help="the result alone on the last line")
    arguments = parser.parse_args()
    root = [f"data.root={arguments.data}", f"data.cache_dir={arguments.out / 'pixels'}"]
    parents = [f"model.tower={arguments.tower}", f"model.language_model={arguments.language_model}"]
    align(load_recipe("align-real", AlignRecipe, [*root, *parents]), arguments.out / "align")
    overrides = [*root, f"model.mllm={arguments.out / 'align'}", *arguments.sets]
    instruct(load_recipe("instruct-real", InstructRecipe, overrides), arguments.out / "instruct")

    found = {}
    for part in PARTS:
        where = {"format": FORMAT, "image_root": arguments.data, "limit": arguments.limit}
        val, train = arguments.data / part / "val.jsonl", arguments.data / part / "train.jsonl"
        result = evaluate(arguments.out / "instruct", val, out=arguments.out / f"eval-{part}", **where)
        found[part] = {
            "model": result.tasks,
            "trivial": trivial_baselines(val, train=train, **where),
            "records": result.results["data"]["records"],
            "bad_records": result.results["data"]["bad_records"],
        }
    runs = {
        "pretrain-lm": arguments.language_model,
        "pretrain": arguments.tower,
        "align": arguments.out / "align",
        "instruct": arguments.out / "instruct",
    }
    limit = [f"--limit {arguments.limit}"] if arguments.limit else []
    command = " ".join([COMMAND, *limit, *(f"--set {key}" for key in arguments.sets)])
    results = {"command": command, "parts": found, **stamp(runs)}
    print(json.dumps(results) if arguments.json else json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
