"""Build the packaged models from nothing: scenes, two towers, a language model, two times two stages, bf16 folders.

    regiontower bench nano-build --out DIR [--until STAGE] [--steps N] [--rows]

A build that was interrupted goes on where it stopped. On one machine, with one number of threads, it gives the same
weights to the bit, because every stage ends by its steps. `DIR/weights` is what the package holds. `--rows` also makes
what stands beside them in the table, each from a finished model: the control after more steps with its tower free, and
nano after more steps on a tower that went on with true labels instead of clusters.
"""

import argparse
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from regiontower.mllm import load_mllm, swap_vision_tower
from regiontower.train_stages.engine.manifest import read_stage
from regiontower.train_stages.mllm_stage import AlignRecipe, InstructRecipe, align, instruct
from regiontower.train_stages.pretrain import pretrain
from regiontower.train_stages.pretrain_lm import LMRecipe, pretrain_lm, tokenizer_corpus
from regiontower.train_stages.pretrain_recipe import PretrainRecipe
from regiontower.train_stages.recipe import load_recipe
from regiontower.train_stages.record_io import read_records
from regiontower.train_stages.region_clusters import ClusterConfig, write_clustered
from regiontower.train_stages.scenes import write_scenes
from regiontower.train_stages.tokenizer import train_tokenizer
from regiontower.vision_towers import load_tower

SCENES = 30_000  # from seed 0
# Preset of the scenes -> their number, as a share of those. With one object a model learns to say where it is, with few
# to find the one that is meant; on the default scenes from the beginning neither is learned for long.
CURRICULUM = {"single": 0.1, "easy": 0.2}
LAST = {"train__steps": 400}  # of the last part, the second time
VOCABULARY = 1536
CLUSTERS = 1_100  # over four times the 268 kinds of thing in a scene (43 glyphs and the sign in 6 colours, 4 grounds)
CROP_SIDE = 56  # as large as single objects are in the first part of stage 0
BOXES = "square100"
THREADS = 2


class Build:
    """One folder in which the stages lie; each method makes one."""

    def __init__(
        self,
        out: Path,
        steps: int | None = None,
        scenes: int = SCENES,
        threads: int = THREADS,
        batch_size: int | None = None,
    ):
        self.out, self.scenes = out, scenes
        self.records = out / "scenes" / "records.jsonl"
        self.clustered = out / "scenes" / "clustered.jsonl"
        self.common: dict[str, Any] = {"train.threads": threads}
        if steps is not None:
            self.common |= {"train.steps": steps, "train.save_steps": steps}
        if batch_size is not None:
            self.common["train.batch_size"] = batch_size
        torch.set_num_threads(threads)

    def run(self, until: str = "weights", rows: bool = False) -> None:
        """Every stage up to `until`, then those of the other rows; a finished one is left as it is, without reading
        its data again."""
        names = [*STAGES]
        for stage in [*names[: names.index(until) + 1], *(ROWS if rows else ())]:
            self.make(stage)

    def make(self, stage: str) -> None:
        """One stage of `STAGES` or `ROWS`, whose parents are there."""
        if (read_stage(self.run_dir(stage)) or {}).get("status") != "finished":
            (STAGES | ROWS)[stage](self)

    def run_dir(self, stage: str) -> Path:
        return self.out / "runs" / stage

    def write_scenes(self) -> None:
        write_scenes(self.out / "scenes", self.scenes, 0)
        for preset, share in CURRICULUM.items():
            write_scenes(self.out / f"scenes-{preset}", max(1, round(share * self.scenes)), 0, preset=preset)

    def train_tokenizer(self) -> None:
        folder = self.out / "tokenizer"
        if not (folder / "tokenizer.json").exists():
            train_tokenizer(tokenizer_corpus(read_records(self.records).records, BOXES), folder, VOCABULARY)

    def cluster(self) -> None:
        if not self.clustered.exists():
            tower = load_tower(self.run_dir("clip"), dtype=torch.float32)
            config = ClusterConfig(crop_side=CROP_SIDE)
            cache = self.out / "pixels"
            count = min(CLUSTERS, self.scenes)  # for trials; a scene has several regions
            write_clustered(read_records(self.records), tower, count, self.clustered, config, cache_dir=cache)

    def train_lm(self) -> None:
        values = {"data.records": self.records, "data.scenes": 0, "data.tokenizer": self.out / "tokenizer"}
        pretrain_lm(load_recipe("lm-nano", LMRecipe, self._overrides(values)), self.run_dir("lm"))

    def save_weights(self) -> None:
        """The three folders of the package."""
        for name, run in (("nano", "instruct-last"), ("nano-clip", "instruct-last-clip")):
            save_packaged_mllm(self.run_dir(run), self.out / "weights" / name)
        save_packaged_lm(self.run_dir("lm"), self.out / "weights" / "nano-lm")

    def train_tower(self, stage: str, recipe: str, parent: str | None = None, **changes: Any) -> None:
        """A RICE tower learns from clustered records, unless its labels are others."""
        clustered = recipe.startswith("rice") and not changes
        values: dict[str, Any] = {
            "data.records": self.clustered if clustered else self.records,
            "data.tokenizer": self.out / "tokenizer",
            "data.cache_dir": self.out / "pixels",
            **{key.replace("__", "."): value for key, value in changes.items()},
        }
        if parent is not None:
            values["model.tower"] = self.run_dir(parent)
        pretrain(load_recipe(recipe, PretrainRecipe, self._overrides(values)), self.run_dir(stage))

    def align(self, stage: str, tower: str) -> None:
        values = {"model.tower": self.run_dir(tower), "model.language_model": self.run_dir("lm")}
        recipe = load_recipe("align-nano", AlignRecipe, self._overrides(values | self._conversations("single")))
        align(recipe, self.run_dir(stage))

    def instruct(self, stage: str, parent: str, part: str = "", **changes: Any) -> None:
        """One part of the curriculum: `single` and `easy` have scenes of their own."""
        values = {"model.mllm": self.run_dir(parent)} | self._conversations(part if part in CURRICULUM else "")
        values |= {key.replace("__", "."): value for key, value in changes.items()}
        name = f"instruct-nano-{part}" if part else "instruct-nano"
        instruct(load_recipe(name, InstructRecipe, self._overrides(values)), self.run_dir(stage))

    def swap_tower(self, stage: str, parent: str, tower: str) -> None:
        """The model `parent` on another tower of the same sizes. The projectors stay: what the towers say is alike."""
        folder = self.run_dir(stage)
        if not (folder / "config.json").exists():
            mllm = load_mllm(self.run_dir(parent), device="cpu", dtype="fp32")
            new = load_tower(self.run_dir(tower), dtype=torch.float32)
            model, processor = swap_vision_tower(*mllm, new, keep_projector=True)
            processor.save_pretrained(folder)
            model.save_pretrained(folder)

    def _conversations(self, preset: str = "") -> dict[str, Any]:
        records = self.records if not preset else self.out / f"scenes-{preset}" / "records.jsonl"
        return {"data.records": records, "data.cache_dir": self.out / "pixels"}

    def _overrides(self, values: Mapping[str, Any]) -> list[str]:
        # A path may hold what YAML reads otherwise (": ", " #"); a JSON string is a YAML string.
        both = {**values, **self.common}
        return [f"{key}={json.dumps(str(v) if isinstance(v, Path) else v)}" for key, v in both.items()]


def _mllm_stages(tower: str, suffix: str = "") -> dict[str, Callable[[Build], None]]:
    """`align`, and `instruct` in its four parts, the last of them twice, on a tower."""
    parts = ("align", "instruct-single", "instruct-easy", "instruct", "instruct-named", "instruct-last")
    align, single, easy, whole, named, last = (part + suffix for part in parts)
    return {
        align: lambda build: build.align(align, tower),
        single: lambda build: build.instruct(single, align, "single"),
        easy: lambda build: build.instruct(easy, single, "easy"),
        whole: lambda build: build.instruct(whole, easy),
        named: lambda build: build.instruct(named, whole, "named"),
        last: lambda build: build.instruct(last, named, "named", **LAST),
    }


# Name -> what makes it, in the order of the build.
STAGES: dict[str, Callable[[Build], None]] = {
    "scenes": Build.write_scenes,
    "tokenizer": Build.train_tokenizer,
    "clip-zoom": lambda build: build.train_tower("clip-zoom", "clip-nano-zoom"),
    "clip": lambda build: build.train_tower("clip", "clip-nano", "clip-zoom"),
    "clusters": Build.cluster,
    "rice-zoom": lambda build: build.train_tower("rice-zoom", "rice-nano-zoom"),
    "rice": lambda build: build.train_tower("rice", "rice-nano", "rice-zoom"),
    "lm": Build.train_lm,
    **_mllm_stages("rice"),
    **_mllm_stages("clip", "-clip"),
    "weights": Build.save_weights,
}
ROW = {"train__steps": 200}  # of the last part, the third time
TRUE_LABELS = {"data__object_labels": "tags", "model__keep_heads": False, "train__steps": 600}
ROWS: dict[str, Callable[[Build], None]] = {
    "unfrozen": lambda build: build.instruct("unfrozen", "instruct-last-clip", "named", **ROW, lr__tower=1e-4),
    "rice-labels": lambda build: build.train_tower("rice-labels", "rice-nano", "rice", **TRUE_LABELS),
    "labels-swapped": lambda build: build.swap_tower("labels-swapped", "instruct-last", "rice-labels"),
    "labels": lambda build: build.instruct("labels", "labels-swapped", "named", **ROW),
}


def save_packaged_mllm(run: Path, folder: Path) -> None:
    """A finished run as a bf16 folder with its `stage.json`."""
    model, processor = load_mllm(run, device="cpu", dtype="bf16")
    _save(run, folder, model.save_pretrained, processor.save_pretrained)


def save_packaged_lm(run: Path, folder: Path) -> None:
    """A finished stage-0b run as a bf16 folder with its `stage.json`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(run, dtype=torch.bfloat16)
    _save(run, folder, model.save_pretrained, AutoTokenizer.from_pretrained(run).save_pretrained)


def _save(run: Path, folder: Path, *savers: Callable[[Path], object]) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for save in savers:
        save(folder)
    shutil.copy(run / "stage.json", folder / "stage.json")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the build")
    parser.add_argument("--until", choices=STAGES, default="weights", help="last stage to make")
    parser.add_argument("--rows", action="store_true", help="also what stands beside them in the table")
    parser.add_argument("--steps", type=int, help="of every stage, for a trial; the recipes' own when absent")
    parser.add_argument("--batch-size", type=int, help="of every stage, for a trial")
    parser.add_argument("--scenes", type=int, default=SCENES, help="training scenes")
    parser.add_argument("--threads", type=int, default=THREADS, help="of torch; part of what makes two builds equal")
    arguments = parser.parse_args()
    build = Build(arguments.out, arguments.steps, arguments.scenes, arguments.threads, arguments.batch_size)
    build.run(arguments.until, arguments.rows)
    print(json.dumps({"out": str(arguments.out), "until": arguments.until}))


if __name__ == "__main__":
    main()
