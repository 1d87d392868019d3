"""One whole run on real images: labels from raw pictures, a tower trained on them, and what its regions are worth.

    regiontower bench label-run --data DATA --out OUT --json

DATA holds `natural/{train,val}.jsonl` and `ocr/train.jsonl` in the `xywh_jsonl` layout. Only the pictures of the train
parts are labelled: `rice-ocr` on the receipts, `rice-objects` with segments (no weights) on the photographs, clustered
by the features of --tower. `pretrain` then trains a new tower on both, and `probe` measures it on people's boxes and
categories of the photographs, beside the same tower before training. A few hundred pictures and steps make no good
tower: the run shows that the stages fit together, and by how much so little helps.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from regiontower.benchmarks._command import typed
from regiontower.benchmarks._stamp import stamp
from regiontower.eval.probe import probe
from regiontower.train_stages.label import ImageSource, RunConfig, find_engine, label_images
from regiontower.train_stages.label.centres import KMeansConfig
from regiontower.train_stages.label.object_clusters import label_objects
from regiontower.train_stages.label.objects import ObjectsConfig
from regiontower.train_stages.label.ocr import OcrConfig
from regiontower.train_stages.label.preview import preview_page
from regiontower.train_stages.pretrain import pretrain
from regiontower.train_stages.pretrain_recipe import PretrainRecipe
from regiontower.train_stages.recipe import load_recipe
from regiontower.train_stages.record_io import read_records

FORMAT = "xywh_jsonl"
TRAIN = ["model.tower=null", "model.keep_heads=false", "data.object_labels=cluster", "train.warmup=0.1"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the parts")
    parser.add_argument("--out", type=Path, required=True, help="folder for labels, towers and probes")
    parser.add_argument("--tower", default="nano", help="whose features are clustered")
    parser.add_argument("--tokenizer", default="nano-lm", help="of transcripts")
    parser.add_argument("--clusters", type=int, default=64)
    parser.add_argument("--limit", type=int, help="label at most so many pictures a part")
    parser.add_argument("--steps", type=int, default=300, help="of pretrain")
    parser.add_argument("--processes", type=int, default=1, help="that label")
    parser.add_argument("--set", action="append", default=[], help="override a key of rice-nano")
    parser.add_argument("--json", action="store_true", help="the result alone on the last line")
    arguments = parser.parse_args()
    found = label_run(arguments)
    command = typed("label-run", parser, arguments)
    results = {"command": command, **found, **stamp({"pretrain": arguments.out / "tower"})}
    print(json.dumps(results) if arguments.json else json.dumps(results, indent=2))


def label_run(arguments: argparse.Namespace) -> dict[str, Any]:
    """The three stages; finished ones are taken up from `arguments.out`."""
    data, out, limit = arguments.data, arguments.out, arguments.limit
    pictures = {part: raw_pictures(data, part, out / "pictures" / part, limit) for part in ("natural", "ocr")}
    run = RunConfig(per_shard=50, processes=arguments.processes, device="cpu")
    text = label_images(find_engine("rice-ocr"), OcrConfig(), ImageSource(pictures["ocr"]), out / "text", run)
    config = ObjectsConfig(arguments.tower, "segments", box_min_edge=64)
    kmeans = KMeansConfig(arguments.clusters)
    objects = label_objects(config, kmeans, ImageSource(pictures["natural"]), out / "objects", run)
    for labels in ("text", "objects"):
        preview_page(out / labels, out / f"{labels}.png")

    records = json.dumps([str(path) for result in (text, objects) for path in result.shards])
    sets = [
        *TRAIN,
        f"data.records={records}",
        f"data.tokenizer={arguments.tokenizer}",
        f"data.cache_dir={out / 'pixels'}",
        f"train.steps={arguments.steps}",
        *arguments.set,
    ]
    pretrain(load_recipe("rice-nano", PretrainRecipe, sets), out / "tower")
    pretrain(load_recipe("rice-nano", PretrainRecipe, [*sets, "train.steps=1", "lr.tower=0"]), out / "untrained")
    train, val = (data / "natural" / f"{split}.jsonl" for split in ("train", "val"))
    where: dict[str, Any] = {"format": FORMAT, "image_root": data, "device": "cpu"}
    return {
        "labels": {name: counts(result) for name, result in (("rice-ocr", text), ("rice-objects", objects))},
        "probe": {
            name: figures(probe(out / name, train, val, out=out / f"probe-{name}", **where))
            for name in ("tower", "untrained")
        },
    }


def raw_pictures(data: Path, part: str, target: Path, limit: int | None) -> Path:
    """A folder of links to the pictures of the train part: nothing of what people drew comes along."""
    records = read_records(data / part / "train.jsonl", FORMAT, data)
    wanted = {path.name: path for path in (records.image_path(record) for record in records.records[:limit])}
    target.mkdir(parents=True, exist_ok=True)
    for link in target.iterdir():  # of an earlier run, perhaps with another limit
        link.unlink()
    for name, source in wanted.items():
        (target / name).symlink_to(source.resolve())
    return target


def counts(result: Any) -> dict[str, Any]:
    """What of the labelling is worth keeping."""
    wanted = ("shards", "images", "records", "regions", "passed_over", "bad")
    return {name: value for name, value in result.report().items() if name in wanted}


def figures(results: dict[str, Any]) -> dict[str, Any]:
    """Classes, and the first readout's figures."""
    return {"classes": results["classes"], **results["readouts"]["own"]}


if __name__ == "__main__":
    main()
