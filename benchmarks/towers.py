"""CLIP, RICE, CLOC and UMG-CLIP side by side: the same ViT, images and steps, several seeds, and the papers' ablations.

    regiontower bench towers --out DIR [--steps 1000] [--seeds 3] [--arms clip rice ...] --json
    regiontower bench towers --out DIR --data DATA [--steps 200] --json

Every arm starts from nothing on cached pixels, a ViT of 0.9 million parameters at 112 px. Ablations have a share of the
steps, a tenth as in the papers. What a probe finds of each tower on held-out images is averaged over the seeds; `signs`
says of each comparison that the papers make whether it holds here, by the differences of the same seeds. An interrupted
run goes on where it stopped. `--data` is a folder with `train.jsonl` and `val.jsonl` in the `xywh_jsonl` layout instead
of generated scenes.
"""

import argparse
import json
import math
import shutil
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scipy.stats import t as student

from regiontower.benchmarks._command import typed
from regiontower.benchmarks._stamp import stamp
from regiontower.benchmarks._tower_arms import ARMS, COMMON, MAIN, SIGNS, Arm, Sign
from regiontower.eval.probe import LitConfig, ProbeConfig, probe
from regiontower.train_stages.pretrain import pretrain
from regiontower.train_stages.pretrain_recipe import PretrainRecipe
from regiontower.train_stages.recipe import differences, flatten, load_recipe, plain
from regiontower.train_stages.record_io import read_records
from regiontower.train_stages.scenes import EVAL_SEED_START, write_scenes
from regiontower.train_stages.tokenizer import train_tokenizer
from regiontower.vision_towers.errors import UserError

SCENES, HELD_OUT = 6_000, 500
FIGURES = (
    "majority", "linear", "knn", "reading_linear", "reading_tokens", "zero_shot", "zero_shot_masks",
    "text_to_region_r1", "text_to_region_r10", "region_to_text_r1", "region_to_text_r10",
    "lit_zero_shot", "lit_text_to_region_r1",
)  # fmt: skip
Figures = dict[str, dict[str, float]]  # readout -> figure -> value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of data, runs and probes")
    parser.add_argument("--data", type=Path, help="folder with train.jsonl and val.jsonl (xywh_jsonl)")
    parser.add_argument("--steps", type=int, default=1_000, help="of a main arm")
    parser.add_argument("--ablation-share", type=float, default=0.1, help="of these steps, for the other arms")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM", help=", ".join(ARMS))
    parser.add_argument("--scenes", type=int, default=SCENES, help="training scenes")
    parser.add_argument("--held-out", type=int, default=HELD_OUT, help="scenes the probes are tested on")
    parser.add_argument("--probe-regions", type=int, default=8_000, help="most regions that a classifier learns from")
    parser.add_argument("--ablation-regions", type=int, default=2_500, help="the same for the other arms")
    parser.add_argument("--lit-steps", type=int, default=200, help="of a text tower for a main arm without; 0: none")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="the result alone on the last line")
    arguments = parser.parse_args()
    data = _photographs(arguments.data, arguments.out) if arguments.data else _scenes(arguments)
    found: dict[str, list[Figures]] = {name: [] for name in arguments.arms}
    kept: dict[str, list[dict[str, Any]]] = {name: [] for name in arguments.arms}
    for seed in range(arguments.seeds):  # all arms of a seed before the next seed: what is there is comparable
        for name in arguments.arms:
            kept[name].append(_measured(name, ARMS[name], seed, data, arguments))
            found[name].append(kept[name][-1]["figures"])
    table = {name: averaged(rows) for name, rows in found.items()}
    results = {
        "command": typed("towers", parser, arguments),
        "data": data.name,
        "steps": {"main": _steps(MAIN["clip"], arguments), "ablations": _steps(ARMS["rice_short"], arguments)},
        "batch_size": arguments.batch_size,
        "seeds": arguments.seeds,
        "classes": next(iter(kept.values()))[0]["classes"],
        "held_out": {name: rows[0]["rows"] for name, rows in kept.items()},
        "seconds": {name: [row["seconds"] for row in rows] for name, rows in kept.items()},
        "arms": table,
        "signs": signs(found, SIGNS),
        **stamp({name: _run(arguments.out, name, 0) for name in arguments.arms}),
    }
    plot(table, arguments.out / "towers.png")
    (arguments.out / "towers.md").write_text(written(table, results["signs"]), encoding="utf-8")
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


def _steps(arm: Arm, arguments: argparse.Namespace) -> int:
    return max(1, round(arguments.steps * (arguments.ablation_share if arm.ablation else 1)))


def _measured(name: str, arm: Arm, seed: int, data: Data, arguments: argparse.Namespace) -> dict[str, Any]:
    """What the probe finds of one arm and seed, made or kept from before: figures, rows, classes, seconds, settings.

    Raises:
        UserError: those kept are of other settings.
    """
    run, started = _run(arguments.out, name, seed), time.perf_counter()
    lit = arguments.lit_steps if arm.recipe == "rice-nano" and not arm.ablation else 0
    regions = arguments.ablation_regions if arm.ablation else arguments.probe_regions
    recipe = _recipe(arm, seed, data, arguments)
    settings = {"data": data.name, "probe_regions": regions, "lit_steps": lit}
    settings |= {key: value for key, value in flatten(plain(recipe)).items() if key not in _PLACES}
    if not data.root:
        settings |= {"scenes": arguments.scenes, "held_out": arguments.held_out}
    kept = run / "figures.json"
    if kept.exists():
        before = json.loads(kept.read_text(encoding="utf-8"))
        if before["settings"] != settings:
            changed = "; ".join(differences(before["settings"], settings))
            raise UserError(f"{run} was measured with other settings ({changed}); give a new --out.")
        return before
    pretrain(recipe, run)
    trained = time.perf_counter()
    config = ProbeConfig(
        data.labels,  # pyright: ignore[reportArgumentType]
        arm.readouts,
        train_regions=regions,
        lit=LitConfig(lit, images=False) if lit else None,
    )
    results = probe(
        run, data.train, data.test, tokenizer=data.tokenizer, config=config, format=data.format, image_root=data.root,
        cache_dir=_pixels(arguments),
    )  # fmt: skip
    there = {
        readout: {figure: row for figure, row in rows.items() if figure in FIGURES and row["n"]}
        for readout, rows in results["readouts"].items()
    }
    measured = {
        "settings": settings,
        "seconds": {"trained": round(trained - started, 1), "probed": round(time.perf_counter() - trained, 1)},
        "classes": results["classes"],
        "rows": {readout: {figure: row["n"] for figure, row in rows.items()} for readout, rows in there.items()},
        "figures": {readout: {figure: row["value"] for figure, row in rows.items()} for readout, rows in there.items()},
    }
    kept.write_text(json.dumps(measured), encoding="utf-8")
    shutil.rmtree(run / "checkpoints", ignore_errors=True)  # the weights are in the run itself
    return measured


# What says where things lie, and no more: kept figures do not depend on it.
_PLACES = ("data.records", "data.root", "data.cache_dir", "data.tokenizer", "train.threads", "train.save_steps")


def _pixels(arguments: argparse.Namespace) -> Path:
    return arguments.out / "pixels"


def _recipe(arm: Arm, seed: int, data: Data, arguments: argparse.Namespace) -> PretrainRecipe:
    objects = {"data.object_labels": data.labels} if arm.recipe == "rice-nano" else {}
    values = {
        **COMMON,
        "data.tokenizer": str(data.tokenizer),
        **objects,
        **arm.changes,
        "data.records": _under(data.train, data.root),
        "data.root": str(data.root) if data.root else None,
        "data.format": data.format,
        "data.cache_dir": str(_pixels(arguments)),
        "train.steps": _steps(arm, arguments),
        "train.batch_size": arguments.batch_size,
        "train.seed": seed,
        "train.threads": arguments.threads,
    }
    return load_recipe(arm.recipe, PretrainRecipe, [f"{key}={json.dumps(value)}" for key, value in values.items()])


def _under(path: Path, root: Path | None) -> str:
    return str(path.relative_to(root)) if root else str(path)


def averaged(rows: Sequence[Figures]) -> dict[str, dict[str, Any]]:
    """readout -> figure -> mean over the seeds, with its interval, and each seed's value."""
    return {
        readout: {figure: over_seeds([row[readout][figure] for row in rows]) for figure in figures}
        for readout, figures in rows[0].items()
    }


def over_seeds(values: Sequence[float]) -> dict[str, Any]:
    """Mean and 95 % interval by Student's t; no interval of a single seed."""
    mean, half = statistics.fmean(values), None
    if len(values) > 1:
        half = float(student.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
    return {"mean": mean, "ci95": None if half is None else [mean - half, mean + half], "seeds": list(values)}


def signs(found: dict[str, list[Figures]], wanted: Sequence[Sign]) -> list[dict[str, Any]]:
    """For each comparison whose arms and figures are there (photographs have no text to read): the difference, seed by
    seed, and whether its mean is what it should be. `resolved`: whether the interval says so too, either way."""
    rows = []
    for sign in wanted:
        if sign.arm not in found or sign.other not in found:
            continue
        pairs = list(zip(found[sign.arm], found[sign.other], strict=True))
        mine = [row[sign.readout].get(sign.figure) for row, _ in pairs]
        others = [row[sign.other_readout].get(sign.figure) for _, row in pairs]
        if None in mine or None in others:
            continue
        difference = over_seeds([a - b for a, b in zip(mine, others, strict=True)])  # pyright: ignore
        about = {"arm": sign.arm, "above": sign.other, "figure": sign.figure, "least": sign.least, "source": sign.why}
        low, high = difference["ci95"] or (-math.inf, math.inf)
        resolved = low > sign.least or high < sign.least
        rows.append({**about, "difference": difference, "holds": difference["mean"] > sign.least, "resolved": resolved})
    return rows


def written(table: dict[str, dict[str, Any]], found: Sequence[dict[str, Any]]) -> str:
    """Both tables in Markdown, in per cent: each figure, and each sign's difference, with half of its interval."""

    def cell(row: dict[str, Any] | None) -> str:
        if row is None:
            return ""
        half = "" if row["ci95"] is None else f" ± {50 * (row['ci95'][1] - row['ci95'][0]):.1f}"
        return f"{100 * row['mean']:.1f}{half}"

    rows = [(name, way, figures) for name, ways in table.items() for way, figures in ways.items()]
    columns = [figure for figure in FIGURES if any(figure in figures for *_, figures in rows)]
    lines = [f"| arm | read by | {' | '.join(columns)} |", "|---" * (len(columns) + 2) + "|"]
    lines += [f"| {name} | {way} | {' | '.join(cell(f.get(column)) for column in columns)} |" for name, way, f in rows]
    lines += ["", "| | above | figure | by | at least | holds | resolved |", "|---" * 7 + "|"]
    for sign in found:
        said = [("no", "yes")[sign[key]] for key in ("holds", "resolved")]
        least = f"{100 * sign['least']:.0f}"
        cells = (sign["arm"], sign["above"], sign["figure"], cell(sign["difference"]), least, *said)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


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
    majority = next(iter(table[next(name for name in MAIN if name in table)].values())).get("majority")
    if majority:
        axis.axhline(majority["mean"], color="gray", linestyle="--", label="always the most frequent class")
        axis.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 1))
    axis.set_xticks(range(len(bars)), [name for name, _ in bars])
    axis.set_ylabel("linear top-1 of regions")
    axis.grid(axis="y", alpha=0.3)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
