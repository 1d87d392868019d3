"""Images a second of every label engine: one process and two, on Ray, and how it grows with the number of images.

    regiontower bench label [--images FOLDER] [--limit 20] [--engines rice-ocr rice-objects vesl granular] --json

`rice-ocr` reads with rapidocr's own weights. The others run ViTs of real size with random weights, on which time does
not depend, and the packaged captioner: `rice-objects` proposes segments and clusters crops of the best 8; `vesl`
captions, and looks for the phrases with an OWLv2 at 448 px; `granular` scores 100 tags with a CLIP, looks for the best
5 with the same OWLv2, and captions the image and its regions. How many regions random boxes come to is in the result,
beside the sizes of all models. ViTs are S/16; `--width 768` makes them B/16.

Without --images, scenes are generated. An engine is run once each way, `--repeats` times, and the medians are given.
`images_per_second` is a whole run's, with the start of processes and models; `labelling_per_second` is the pace after
every process has finished its first shard; `start_seconds` is what is left of the time until then. Growth: one process
on about a quarter, half, and all of the images, without the start.
"""

import argparse
import json
import shutil
import string
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModel,
    Owlv2Config,
    Owlv2ForObjectDetection,
    Owlv2ImageProcessor,
    Owlv2Processor,
)

from regiontower.benchmarks._command import typed
from regiontower.benchmarks._stamp import stamp
from regiontower.mllm.prompts import DESCRIBE_IMAGE
from regiontower.train_stages.label import ImageSource, LabelResult, RunConfig, find_engine, label_images
from regiontower.train_stages.label.centres import KMeansConfig
from regiontower.train_stages.label.granular import GranularConfig
from regiontower.train_stages.label.object_clusters import label_objects
from regiontower.train_stages.label.objects import ObjectsConfig
from regiontower.train_stages.label.ocr import OcrConfig
from regiontower.train_stages.label.shard import DONE
from regiontower.train_stages.label.vesl import VeslConfig
from regiontower.train_stages.scenes import write_scenes
from regiontower.train_stages.webdataset import IMAGE_SUFFIXES

Run = Callable[[ImageSource, Path, RunConfig], LabelResult]
ENGINES = ("rice-ocr", "rice-objects", "vesl", "granular")
PER_SHARD = 2  # small: with few shards it would count that one process ends before the other
AT_LEAST = 4 * PER_SHARD  # two for each of two processes; the first ends with the start


@dataclass(frozen=True)
class Sizes:
    """Of the random models: width, layers and heads of every ViT; pixels of the detector's input. new_tokens: of a
    caption; regions: of an image, at most, for `rice-objects`; tags_found: of an image, for `granular`."""

    width: int = 384
    layers: int = 12
    heads: int = 6
    detector: int = 448
    new_tokens: int = 64
    regions: int = 8
    tags_found: int = 5

    def fields(self) -> dict[str, int]:
        """Of a transformers config."""
        return {
            "hidden_size": self.width,
            "intermediate_size": 4 * self.width,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
        }


@dataclass(frozen=True)
class Timing:
    """Of a run: all seconds, and those after which each shard was finished, in order. regions: of an image."""

    seconds: float
    ends: tuple[float, ...]
    regions: float

    def pace(self, processes: int) -> float:
        """Images a second after every process has finished its first shard."""
        return PER_SHARD * (len(self.ends) - processes) / (self.ends[-1] - self.ends[processes - 1])

    def start(self, processes: int) -> float:
        """Seconds before that which the pace does not explain."""
        return max(0.0, self.ends[processes - 1] - PER_SHARD * processes / self.pace(processes))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="folder of images; generated scenes when absent")
    parser.add_argument("--limit", type=int, default=20, help="the first so many, an even number; at least 8")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--width", type=int, choices=(384, 768), default=384, help="of the random ViTs: S or B")
    parser.add_argument("--json", action="store_true", help="the result alone on the last line")
    arguments = parser.parse_args()
    sizes = Sizes(arguments.width, heads=arguments.width // 64)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        if arguments.images is None:
            write_scenes(folder / "scenes", arguments.limit, seed=0)
        images = take(arguments.images or folder / "scenes" / "images", folder / "images", arguments.limit)
        if len(images) < AT_LEAST:
            parser.error(f"there are {len(images)} images; {AT_LEAST} are needed")
        runs = engine_runs(folder / "models", arguments.engines, sizes)
        found = measure(runs, images, folder / "work", arguments.repeats)
    results = {
        "engines": found,
        "images": {"count": len(images), "are": "scenes" if arguments.images is None else "the user's"},
        "sizes": {**asdict(sizes), "patch": 16, "tags": 100, "images_a_shard": PER_SHARD},
        "command": typed("label", parser, arguments),
        **stamp({}),
    }
    print(json.dumps(results) if arguments.json else json.dumps(results, indent=2))


def measure(runs: Mapping[str, Run], images: Sequence[Path], work: Path, repeats: int) -> dict[str, Any]:
    """Engine -> ways to run it (`"1"`, `"2"` processes, `"2 on ray"`) and its growth."""
    ways = {"1": {"processes": 1}, "2": {"processes": 2}}
    if find_spec("ray") is not None:
        ways["2 on ray"] = {"processes": 2, "engine": "ray"}
    whole = folder_of(images, work / "all")
    found: dict[str, Any] = {}
    for name, run in runs.items():
        rows: dict[str, list[Timing]] = {way: [] for way in ways}
        for _ in range(repeats):
            for way, options in ways.items():
                rows[way].append(timed(run, whole, work, options))
        found[name] = {way: speed(rows[way], len(images), options["processes"]) for way, options in ways.items()}
        one, two = (found[name][way]["labelling_per_second"] for way in ("1", "2"))
        found[name]["two_processes_beside_one"] = round(two / one, 3)
        found[name]["regions_an_image"] = round(median(each.regions for each in rows["1"]), 2)
        found[name]["growth"] = growth(run, images, work, rows["1"])
    return found


def speed(rows: Sequence[Timing], count: int, processes: int) -> dict[str, Any]:
    """Of runs on all `count` images."""
    return {
        "images_per_second": round(count / median(each.seconds for each in rows), 3),
        "labelling_per_second": round(median(each.pace(processes) for each in rows), 3),
        "start_seconds": round(median(each.start(processes) for each in rows), 2),
        "seconds": [round(each.seconds, 2) for each in rows],
    }


def growth(run: Run, images: Sequence[Path], work: Path, whole: Sequence[Timing]) -> list[dict[str, float]]:
    """One process on a quarter, half, and all (which `whole` has measured): seconds an image that the start does not
    explain."""
    start = median(each.start(1) for each in whole)
    seconds = {len(images): median(each.seconds for each in whole)}
    for count in (in_shards(len(images) // parts) for parts in (2, 4)):
        some = folder_of(images[:count], work / f"first-{count}")
        seconds[count] = timed(run, some, work, {"processes": 1}).seconds
    return [
        {
            "images": count,
            "seconds": round(seconds[count], 2),
            "seconds_an_image": round((seconds[count] - start) / count, 4),
        }
        for count in sorted(seconds)
    ]


def timed(run: Run, images: Path, work: Path, options: Mapping[str, Any]) -> Timing:
    """A run from nothing."""
    out = work / "out"
    shutil.rmtree(out, ignore_errors=True)
    began, started = time.time(), time.perf_counter()
    result = run(ImageSource(images), out, RunConfig(per_shard=PER_SHARD, device="cpu", progress=False, **options))
    seconds = time.perf_counter() - started
    ends = sorted(note.stat().st_mtime - began for note in out.rglob(f"{DONE}/*.json"))
    return Timing(seconds, tuple(ends), result.regions / result.images)


def in_shards(count: int) -> int:
    """As many as fill shards; one shard at least."""
    return max(1, count // PER_SHARD) * PER_SHARD


def take(source: Path, target: Path, limit: int) -> list[Path]:
    """The first `limit` images, copied; as many as fill shards."""
    names = sorted(path for path in source.rglob("*") if path.suffix.lower()[1:] in IMAGE_SUFFIXES)[:limit]
    names = names[: len(names) // PER_SHARD * PER_SHARD]
    target.mkdir(parents=True)
    return [Path(shutil.copy(path, target / f"{number:05d}{path.suffix}")) for number, path in enumerate(names)]


def folder_of(images: Sequence[Path], target: Path) -> Path:
    """A folder of these images alone."""
    if not target.is_dir():
        target.mkdir(parents=True)
        for path in images:
            (target / path.name).hardlink_to(path)
    return target


def engine_runs(models: Path, names: Sequence[str], sizes: Sizes) -> dict[str, Run]:
    """Name -> a function that labels a source into a folder. models: where random ones are written."""
    torch.manual_seed(0)
    tags = models / "tags.txt"
    write_models(models, sizes)
    tags.write_text("\n".join(f"{a}{b}" for a in string.ascii_lowercase[:10] for b in string.ascii_lowercase[:10]))
    tower, owl, clip = (str(models / name) for name in ("tower", "owl", "clip"))
    settings: dict[str, Any] = {
        "rice-ocr": OcrConfig(),
        "vesl": VeslConfig(owl, "nano", DESCRIBE_IMAGE, detector_size=sizes.detector, max_new_tokens=sizes.new_tokens),
        "granular": GranularConfig(
            clip,
            owl,
            str(tags),
            captioner="nano",
            prompt=DESCRIBE_IMAGE,
            max_new_tokens=sizes.new_tokens,
            min_tag_score=-1,
            max_tags=sizes.tags_found,
            detector_size=sizes.detector,
            image_min_edge=1,
        ),
    }

    def engine_run(name: str) -> Run:
        return lambda source, out, run: label_images(find_engine(name), settings[name], source, out, run)

    objects = ObjectsConfig(tower, "segments", image_min_edge=1, box_min_edge=32, max_regions=sizes.regions)
    runs: dict[str, Run] = {name: engine_run(name) for name in settings}
    runs["rice-objects"] = lambda source, out, run: label_objects(objects, KMeansConfig(1), source, out, run)
    return {name: runs[name] for name in names}


def write_models(folder: Path, sizes: Sizes) -> None:
    """A ViT, an OWLv2 and a CLIP, each with patches of 16 px."""
    letters = [*string.ascii_lowercase, *string.digits, *".,-'"]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(
        vocab={token: number for number, token in enumerate(tokens)},
        merges=[],
        model_max_length=16,
        pad_token="<|endoftext|>",
    )
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text = {**sizes.fields(), **ids, "vocab_size": len(tokens), "max_position_embeddings": 16}
    vision = {**sizes.fields(), "patch_size": 16, "image_size": 224}
    CLIPVisionModel(CLIPVisionConfig(**vision)).save_pretrained(folder / "tower")
    both = {"text_config": text, "vision_config": vision, "projection_dim": sizes.width}
    CLIPModel(CLIPConfig(**both)).save_pretrained(folder / "clip")
    CLIPProcessor(CLIPImageProcessor(), tokenizer).save_pretrained(folder / "clip")
    square = {"height": sizes.detector, "width": sizes.detector}
    Owlv2ForObjectDetection(
        Owlv2Config(**{**both, "vision_config": {**vision, "image_size": sizes.detector}})
    ).save_pretrained(folder / "owl")
    Owlv2Processor(Owlv2ImageProcessor(size=square), tokenizer).save_pretrained(folder / "owl")


if __name__ == "__main__":
    main()
