"""CLIP, RICE, CLOC and UMG-CLIP side by side: the same ViT, images and steps, several seeds, and the papers' ablations.

    regiontower bench towers --out DIR [--steps 600] [--seeds 3] [--arms clip rice ...] --json
    regiontower bench towers --out DIR --data DATA [--steps 200] --json

Every arm starts from nothing on cached pixels: zoomed views of 56 px for 70 % of the steps, then of 112 px. Ablations
have a tenth of the steps. What a probe finds of each tower on held-out images is averaged over the seeds. An
interrupted run goes on where it stopped. `--data` is a folder with `train.jsonl` and `val.jsonl` in the `xywh_jsonl`
layout instead of generated scenes.
"""

import argparse
import json
import math
import statistics
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from scipy.stats import t as student

from regiontower.benchmarks._stamp import stamp
from regiontower.eval.probe import LitConfig, ProbeConfig, probe
from regiontower.train_stages.pretrain import pretrain
from regiontower.train_stages.pretrain_recipe import PretrainRecipe
from regiontower.train_stages.recipe import load_recipe
from regiontower.train_stages.record_io import read_records
from regiontower.train_stages.scenes import EVAL_SEED_START, write_scenes
from regiontower.train_stages.tokenizer import train_tokenizer

SCENES, HELD_OUT = 6_000, 500
FIGURES = (
    "linear", "knn", "reading_linear", "zero_shot", "text_to_region_r1", "region_to_text_r1", "lit_zero_shot",
    "lit_text_to_region_r1",
)  # fmt: skip
COMMON = {
    "model.tower": None,
    "model.keep_heads": False,
    "data.augment.zoom": 0.7,
    "data.view_schedule": [[0.7, 56]],
    "train.compile": False,
    "train.save_steps": 100,
}
NO_TAGS = {"image_tag": 0.0, "region_tag": 0.0, "pixel_tag": 0.0}


@dataclass(frozen=True)
class Arm:
    """recipe: what is trained. changes: of its keys. readouts: how the probe reads regions. share: of the steps."""

    recipe: str
    changes: dict[str, Any]
    readouts: tuple[str, ...] = ("own",)
    share: float = 1.0


MAIN = {
    "clip": Arm("clip-nano", {}, ("value", "crops")),
    "rice": Arm("rice-nano", {}),
    "cloc": Arm("cloc-nano", {"model.cloc.text.text_layers": 2}),
    "umg_clip": Arm("umg-clip-nano", {"model.umg_clip.text.text_layers": 2}),
}
_SHORT = {name: replace(arm, share=0.1) for name, arm in MAIN.items()}


def _changed(arm: str, **changes: Any) -> Arm:
    short = _SHORT[arm]
    return replace(short, changes=short.changes | {key.replace("__", "."): value for key, value in changes.items()})


# Name -> the arm; `_short` ones are what they are compared with.
ABLATIONS = {
    "rice_short": _SHORT["rice"],
    "rice_no_ocr": _changed("rice", data__tokenizer=None),
    **{f"rice_n{count}": _changed("rice", data__regions_per_image=count) for count in (1, 5, 20)},
    "rice_n10": _changed("rice", data__regions_per_image=10),
    "rice_rho_0.1": _changed("rice", model__rice__loss__sample_rate=0.1),
    "cloc_short": _SHORT["cloc"],
    "cloc_no_filter": _changed("cloc", model__cloc__loss__same_above=None),
    # Region-text contrast without a Prompter: boxes by RoIAlign of dense features, the same loss otherwise.
    "cloc_roi_align": _changed(
        "umg_clip", model__umg_clip__loss={**NO_TAGS, "pixel_caption": 0.0, "region_caption": 1.0, "same_above": 0.9}
    ),
    "umg_clip_short": _SHORT["umg_clip"],
    "umg_clip_no_region": _changed("umg_clip", model__umg_clip__loss={"region_caption": 0.0, "region_tag": 0.0}),
    "umg_clip_no_pixel": _changed("umg_clip", model__umg_clip__loss={"pixel_caption": 0.0, "pixel_tag": 0.0}),
}
ARMS = MAIN | ABLATIONS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of data, runs and probes")
    parser.add_argument("--data", type=Path, help="folder with train.jsonl and val.jsonl (xywh_jsonl)")
    parser.add_argument("--steps", type=int, default=600, help="of a main arm")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM", help=", ".join(ARMS))
    parser.add_argument("--scenes", type=int, default=SCENES, help="training scenes")
    parser.add_argument("--held-out", type=int, default=HELD_OUT, help="scenes the probes are tested on")
    parser.add_argument("--lit-steps", type=int, default=300, help="of a text tower for towers without one; 0: none")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="the result alone on the last line")
    arguments = parser.parse_args()
    data = _photographs(arguments.data, arguments.out) if arguments.data else _scenes(arguments)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in arguments.arms}
    for seed in range(arguments.seeds):  # all arms of a seed before the next seed: what is there is comparable
        for name in arguments.arms:
            found[name].append(_measured(name, ARMS[name], seed, data, arguments))
    table = {name: averaged(rows) for name, rows in found.items()}
    results = {
        "command": f"regiontower bench towers --out DIR --steps {arguments.steps} --seeds {arguments.seeds} --json",
        "data": data.name,
        "steps": arguments.steps,
        "batch_size": arguments.batch_size,
        "seeds": arguments.seeds,
        "arms": table,
        **stamp({name: _run(arguments.out, name, 0) for name in arguments.arms}),
    }
    plot(table, arguments.out / "towers.png")
    print(json.dumps(results) if arguments.json else json.dumps(results, indent=2))


@dataclass(frozen=True)
class Data:
    """name: what it is. train, test: records in `format` with images in `root`. labels: what an object class is."""

    name: str
    train: Path
    test: Path
    tokenizer: Path
    labels: str = "tags"
    format: str = "records"
    root: Path | None = None


def _scenes(arguments: argparse.Namespace) -> Data:
    out: Path = arguments.out
    train = write_scenes(out / "train", arguments.scenes, 0)
    test = write_scenes(out / "test", arguments.held_out, EVAL_SEED_START)
    return Data("scenes", train, test, _tokenizer(out, read_records(train).records))


def _photographs(folder: Path, out: Path) -> Data:
    train, test = folder / "train.jsonl", folder / "val.jsonl"
    records = read_records(train, "xywh_jsonl", folder.parent).records
    return Data("photographs", train, test, _tokenizer(out, records), "category", "xywh_jsonl", folder.parent)


def _tokenizer(out: Path, records: list) -> Path:
    folder = out / "tokenizer"
    if not (folder / "tokenizer.json").exists():
        regions = [region for record in records for region in record.regions]
        texts = [text for region in regions for text in (*region.texts, region.category, region.ocr) if text]
        train_tokenizer([*texts, *(caption for record in records for caption in record.captions)], folder, 1024)
    return folder


def _run(out: Path, name: str, seed: int) -> Path:
    return out / "runs" / f"{name}-{seed}"


def _measured(name: str, arm: Arm, seed: int, data: Data, arguments: argparse.Namespace) -> dict[str, Any]:
    """The probe's figures of one arm and seed: readout -> figure -> value."""
    run = _run(arguments.out, name, seed)
    kept = run / "figures.json"
    if kept.exists():
        return json.loads(kept.read_text(encoding="utf-8"))
    root = str(data.root) if data.root else None
    steps = max(1, round(arguments.steps * arm.share))
    objects = {"data.object_labels": data.labels} if arm.recipe == "rice-nano" else {}
    values = {
        **COMMON,
        "data.tokenizer": str(data.tokenizer),
        **objects,
        **arm.changes,
        "data.records": _under(data.train, data.root),
        "data.root": root,
        "data.format": data.format,
        "data.cache_dir": str(arguments.out / "pixels"),
        "train.steps": steps,
        "train.batch_size": arguments.batch_size,
        "train.seed": seed,
        "train.threads": arguments.threads,
    }
    recipe = load_recipe(arm.recipe, PretrainRecipe, [f"{key}={json.dumps(value)}" for key, value in values.items()])
    pretrain(recipe, run)
    lit = LitConfig(arguments.lit_steps) if arguments.lit_steps and arm.recipe == "rice-nano" else None
    config = ProbeConfig(data.labels, arm.readouts, lit=lit)  # pyright: ignore[reportArgumentType]
    results = probe(
        run, data.train, data.test, tokenizer=data.tokenizer, config=config, format=data.format, image_root=root
    )
    figures = {
        readout: {figure: row["value"] for figure, row in rows.items() if figure in FIGURES and row["n"]}
        for readout, rows in results["readouts"].items()
    }
    kept.write_text(json.dumps(figures), encoding="utf-8")
    return figures


def _under(path: Path, root: Path | None) -> str:
    return str(path.relative_to(root)) if root else str(path)


def averaged(rows: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, Any]]:
    """readout -> figure -> mean over the seeds, with a 95 % interval by Student's t, and each seed's value."""
    found: dict[str, dict[str, Any]] = {}
    for readout, figures in rows[0].items():
        found[readout] = {}
        for figure in figures:
            values = [row[readout][figure] for row in rows]
            mean = statistics.fmean(values)
            half = None
            if len(values) > 1:
                half = float(student.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
            interval = None if half is None else [mean - half, mean + half]
            found[readout][figure] = {"mean": mean, "ci95": interval, "seeds": values}
    return found


def plot(table: dict[str, dict[str, Any]], path: Path) -> None:
    """Linear classification of regions, a bar for each main arm and readout, with the interval."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    bars = [(f"{name}\n{way}", rows["linear"]) for name in MAIN if name in table for way, rows in table[name].items()]
    if not bars:
        return
    figure = Figure(figsize=(1.6 * len(bars) + 1, 3.5), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    for place, (_, row) in enumerate(bars):
        low, high = row["ci95"] or (row["mean"], row["mean"])
        axis.bar(place, row["mean"], color="tab:blue", width=0.6)
        axis.errorbar(place, row["mean"], [[row["mean"] - low], [high - row["mean"]]], color="black", capsize=4)
    axis.set_xticks(range(len(bars)), [name for name, _ in bars])
    axis.set_ylabel("linear top-1 of regions")
    axis.grid(axis="y", alpha=0.3)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
