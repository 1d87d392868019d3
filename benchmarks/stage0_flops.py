"""What a step of nano's stage 0 computes beside one of its control's: the same ViT and images, counted in FLOPs.

    regiontower bench stage0-flops --json

Every part of a step counts: tower, heads, gradients, optimizer. RICE's class centres are a thousand, as many as nano's
clusters are. The count of one step is the difference between runs of two steps and of one.
"""

import argparse
import json
import tempfile
from pathlib import Path

from torch.utils.flop_counter import FlopCounterMode

from regiontower.benchmarks._command import typed
from regiontower.benchmarks._stamp import stamp
from regiontower.benchmarks.nano_build import CLUSTERS
from regiontower.train_stages.pretrain import pretrain
from regiontower.train_stages.pretrain_recipe import PretrainRecipe
from regiontower.train_stages.recipe import load_recipe
from regiontower.train_stages.scenes import write_scenes
from regiontower.vision_towers.packaged import model_source

RECIPES = {"rice": ("rice-nano-zoom", "rice-nano"), "clip": ("clip-nano-zoom", "clip-nano")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, help="the recipes' own when absent")
    parser.add_argument("--json", action="store_true", help="the result alone on the last line")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-flops-") as folder:
        records = _with_clusters(write_scenes(Path(folder) / "scenes", CLUSTERS // 4, 0, progress=False))
        found = {
            name: {recipe: _step(recipe, records, Path(folder), arguments.batch_size) for recipe in recipes}
            for name, recipes in RECIPES.items()
        }
    total = {name: sum(row["gflop_a_step"] * row["steps"] for row in rows.values()) for name, rows in found.items()}
    results = {
        "command": typed("stage0-flops", parser, arguments),
        **found,
        "rice_over_clip": round(total["rice"] / total["clip"], 3),
        **stamp({}),
    }
    print(json.dumps(results) if arguments.json else json.dumps(results, indent=2))


def _with_clusters(records: Path) -> Path:
    """The same records with a cluster for every region; which one does not matter here."""
    clustered, number = records.with_name("clustered.jsonl"), 0
    with clustered.open("w", encoding="utf-8") as file:
        for line in records.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            for region in record["regions"]:
                region["cluster"], number = number % CLUSTERS, number + 1
            file.write(json.dumps(record) + "\n")
    return clustered


def _step(name: str, records: Path, folder: Path, batch_size: int | None) -> dict[str, float]:
    """GFLOP of a step of a recipe that starts from nothing, and its number of steps."""
    values = {
        "model.tower": None,
        "model.keep_heads": False,
        "data.records": str(records),
        "data.tokenizer": model_source("nano-lm"),
        "data.cache_dir": str(folder / "pixels"),
        "train.compile": False,
        "train.threads": 1,
    }
    if batch_size is not None:
        values["train.batch_size"] = batch_size
    own = load_recipe(name, PretrainRecipe, [f"{key}={json.dumps(value)}" for key, value in values.items()])
    counts = []
    for steps in (1, 2):
        more = [*values.items(), ("train.steps", steps)]
        recipe = load_recipe(name, PretrainRecipe, [f"{key}={json.dumps(value)}" for key, value in more])
        with FlopCounterMode(display=False) as counter:
            pretrain(recipe, folder / f"{name}-{steps}")
        counts.append(counter.get_total_flops())
    return {"gflop_a_step": round((counts[1] - counts[0]) / 1e9, 3), "steps": own.train.steps or 0}


if __name__ == "__main__":
    main()
