"""Build the packaged models from nothing: scenes, two towers, a language model, two times two stages, bf16 folders.

    regiontower bench nano-build --out DIR [--until STAGE] [--steps N]

A build that was interrupted goes on where it stopped. On one machine, with one number of threads, it gives the same
weights to the bit, because every stage ends by its steps. `DIR/weights` is what the package holds.
"""

import argparse
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from regiontower.mllm import load_mllm
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
VOCABULARY = 1536
CLUSTERS = 1_100  # over four times the 268 kinds of thing in a scene (43 glyphs and the sign in 6 colours, 4 grounds)
CROP_SIDE = 56  # as large as single objects are in the first part of stage 0
BOXES = "square100"
THREADS = 2
STAGES = (
    "scenes", "tokenizer", "clip-zoom", "clip", "clusters", "rice-zoom", "rice", "lm",
    "align", "instruct-single", "instruct-easy", "instruct",
    "align-clip", "instruct-single-clip", "instruct-easy-clip", "instruct-clip", "weights",
)  # fmt: skip


class Build:
    """One folder in which the stages lie; each method makes one stage and returns at once when it is there."""

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

    def run(self, until: str = STAGES[-1]) -> None:
        """Every stage up to `until`; a finished one is left as it is, without reading its data again."""
        for stage in STAGES[: STAGES.index(until) + 1]:
            if (read_stage(self.run_dir(stage)) or {}).get("status") == "finished":
                continue
            getattr(self, "make_" + stage.replace("-", "_"))()

    def run_dir(self, stage: str) -> Path:
        return self.out / "runs" / stage

    def make_scenes(self) -> None:
        write_scenes(self.out / "scenes", self.scenes, 0)
        for preset, share in CURRICULUM.items():
            write_scenes(self.out / f"scenes-{preset}", max(1, round(share * self.scenes)), 0, preset=preset)

    def make_tokenizer(self) -> None:
        folder = self.out / "tokenizer"
        if not (folder / "tokenizer.json").exists():
            train_tokenizer(tokenizer_corpus(read_records(self.records).records, BOXES), folder, VOCABULARY)

    def make_clip_zoom(self) -> None:
        self._tower("clip-zoom", "clip-nano-zoom", self.records)

    def make_clip(self) -> None:
        self._tower("clip", "clip-nano", self.records, parent="clip-zoom")

    def make_clusters(self) -> None:
        if not self.clustered.exists():
            tower = load_tower(self.run_dir("clip"), dtype=torch.float32)
            config = ClusterConfig(crop_side=CROP_SIDE)
            cache = self.out / "pixels"
            count = min(CLUSTERS, self.scenes)  # for trials; a scene has several regions
            write_clustered(read_records(self.records), tower, count, self.clustered, config, cache_dir=cache)

    def make_rice_zoom(self) -> None:
        self._tower("rice-zoom", "rice-nano-zoom", self.clustered)

    def make_rice(self) -> None:
        self._tower("rice", "rice-nano", self.clustered, parent="rice-zoom")

    def make_lm(self) -> None:
        values = {"data.records": self.records, "data.scenes": 0, "data.tokenizer": self.out / "tokenizer"}
        pretrain_lm(load_recipe("lm-nano", LMRecipe, self._overrides(values)), self.run_dir("lm"))

    def make_align(self) -> None:
        self._align("align", "rice")

    def make_instruct_single(self) -> None:
        self._instruct("instruct-single", "align", "single")

    def make_instruct_easy(self) -> None:
        self._instruct("instruct-easy", "instruct-single", "easy")

    def make_instruct(self) -> None:
        self._instruct("instruct", "instruct-easy")

    def make_align_clip(self) -> None:
        self._align("align-clip", "clip")

    def make_instruct_single_clip(self) -> None:
        self._instruct("instruct-single-clip", "align-clip", "single")

    def make_instruct_easy_clip(self) -> None:
        self._instruct("instruct-easy-clip", "instruct-single-clip", "easy")

    def make_instruct_clip(self) -> None:
        self._instruct("instruct-clip", "instruct-easy-clip")

    def make_weights(self) -> None:
        """The three folders of the package."""
        for name, run in (("nano", "instruct"), ("nano-clip", "instruct-clip")):
            save_packaged_mllm(self.run_dir(run), self.out / "weights" / name)
        save_packaged_lm(self.run_dir("lm"), self.out / "weights" / "nano-lm")

    def _tower(self, stage: str, recipe: str, records: Path, parent: str | None = None) -> None:
        values: dict[str, Any] = {
            "data.records": records,
            "data.tokenizer": self.out / "tokenizer",
            "data.cache_dir": self.out / "pixels",
        }
        if parent is not None:
            values["model.tower"] = self.run_dir(parent)
        pretrain(load_recipe(recipe, PretrainRecipe, self._overrides(values)), self.run_dir(stage))

    def _align(self, stage: str, tower: str) -> None:
        values = {"model.tower": self.run_dir(tower), "model.language_model": self.run_dir("lm")}
        recipe = load_recipe("align-nano", AlignRecipe, self._overrides(values | self._conversations("single")))
        align(recipe, self.run_dir(stage))

    def _instruct(self, stage: str, parent: str, preset: str | None = None) -> None:
        values = {"model.mllm": self.run_dir(parent)} | self._conversations(preset)
        name = "instruct-nano" if preset is None else f"instruct-nano-{preset}"
        instruct(load_recipe(name, InstructRecipe, self._overrides(values)), self.run_dir(stage))

    def _conversations(self, preset: str | None) -> dict[str, Any]:
        records = self.records if preset is None else self.out / f"scenes-{preset}" / "records.jsonl"
        return {"data.records": records, "data.cache_dir": self.out / "pixels"}

    def _overrides(self, values: Mapping[str, Any]) -> list[str]:
        # A path may hold what YAML reads otherwise (": ", " #"); a JSON string is a YAML string.
        both = {**values, **self.common}
        return [f"{key}={json.dumps(str(v) if isinstance(v, Path) else v)}" for key, v in both.items()]


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
    parser.add_argument("--until", choices=STAGES, default=STAGES[-1], help="last stage to make")
    parser.add_argument("--steps", type=int, help="of every stage, for a trial; the recipes' own when absent")
    parser.add_argument("--batch-size", type=int, help="of every stage, for a trial")
    parser.add_argument("--scenes", type=int, default=SCENES, help="training scenes")
    parser.add_argument("--threads", type=int, default=THREADS, help="of torch; part of what makes two builds equal")
    arguments = parser.parse_args()
    build = Build(arguments.out, arguments.steps, arguments.scenes, arguments.threads, arguments.batch_size)
    build.run(arguments.until)
    print(json.dumps({"out": str(arguments.out), "until": arguments.until}))


if __name__ == "__main__":
    main()
