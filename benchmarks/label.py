"""Images a second of every label engine: one process and two, on Ray, and how it grows with the number of images.

    regiontower bench label [--images FOLDER] [--limit 24] [--engines rice-ocr rice-objects vesl granular] --json

`rice-ocr` reads with rapidocr's own weights. The others run models of the real size (ViT-B/16 and the like) with random
weights, on which time does not depend, and the packaged captioner: `rice-objects` proposes segments and clusters crops;
`vesl` captions, and looks for the phrases with an OWLv2 B/16 at 448 px; `granular` scores 100 tags with a CLIP B/16,
captions, and looks for the tags with the same OWLv2 (random boxes are all too small, so no region is captioned).

Without --images, scenes are generated. Ways to run are measured in turn, `--repeats` times, and the medians given. The
start of processes and models is part of the time; it is given apart, measured on two images. Growth: one process on a
quarter, half, and all of the images, without the start.
"""

import argparse
import json
import shutil
import string
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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

from regiontower.benchmarks._stamp import stamp
from regiontower.train_stages.label import ImageSource, RunConfig, find_engine, label_images
from regiontower.train_stages.label.centres import KMeansConfig
from regiontower.train_stages.label.granular import GranularConfig
from regiontower.train_stages.label.object_clusters import label_objects
from regiontower.train_stages.label.objects import ObjectsConfig
from regiontower.train_stages.label.ocr import OcrConfig
from regiontower.train_stages.label.vesl import VeslConfig
from regiontower.train_stages.scenes import write_scenes
from regiontower.train_stages.webdataset import IMAGE_SUFFIXES

Run = Callable[[ImageSource, Path, RunConfig], object]
ENGINES = ("rice-ocr", "rice-objects", "vesl", "granular")
PER_SHARD = 4
FEW = 2  # images for which nearly all time is the start's


@dataclass(frozen=True)
class Sizes:
    """Of the random models: width, layers and heads; pixels of the detector's input."""

    width: int = 768
    layers: int = 12
    heads: int = 12
    detector: int = 448
    new_tokens: int = 64

    def fields(self) -> dict[str, int]:
        """Of a transformers config."""
        return {
            "hidden_size": self.width,
            "intermediate_size": 4 * self.width,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="folder of images; generated scenes when absent")
    parser.add_argument("--limit", type=int, default=24, help="the first so many")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="the result alone on the last line")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        if arguments.images is None:
            write_scenes(folder / "scenes", arguments.limit, seed=0)
        images = take(arguments.images or folder / "scenes" / "images", folder / "images", arguments.limit)
        runs = engine_runs(folder / "models", arguments.engines, Sizes())
        found = measure(runs, images, folder / "work", arguments.repeats)
    given = f"--limit {arguments.limit} --engines {' '.join(arguments.engines)} --repeats {arguments.repeats}"
    source = "" if arguments.images is None else "--images FOLDER "
    results = {
        "engines": found,
        "images": {"count": len(images), "are": "scenes" if arguments.images is None else "the user's"},
        "command": f"regiontower bench label {source}{given} --json",
        **stamp({}),
    }
    print(json.dumps(results) if arguments.json else json.dumps(results, indent=2))


def measure(runs: Mapping[str, Run], images: Sequence[Path], work: Path, repeats: int) -> dict[str, Any]:
    """Engine -> ways to run it (`"1"`, `"2"` processes, `"2 on ray"`) and its growth."""
    ways = {"1": {"processes": 1}, "2": {"processes": 2}}
    if find_spec("ray") is not None:
        ways["2 on ray"] = {"processes": 2, "engine": "ray"}
    few, whole = folder_of(images[:FEW], work / "few"), folder_of(images, work / "all")
    found: dict[str, Any] = {}
    for name, run in runs.items():
        seconds: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
        for _ in range(repeats):
            for way, options in ways.items():
                seconds[way].append((timed(run, few, work, options), timed(run, whole, work, options)))
        found[name] = {way: speed(rows, len(images)) for way, rows in seconds.items()}
        one, two = (found[name][way]["images_per_second"] for way in ("1", "2"))
        found[name]["two_processes_beside_one"] = round(two / one, 3)
        found[name]["growth"] = growth(run, images, work, median(start for start, _ in seconds["1"]))
    return found


def speed(rows: Sequence[tuple[float, float]], count: int) -> dict[str, Any]:
    """rows: seconds of the start, and of all `count` images with it."""
    return {
        "images_per_second": round(count / median(whole for _, whole in rows), 3),
        "start_seconds": round(median(start for start, _ in rows), 2),
        "seconds": [round(whole, 2) for _, whole in rows],
    }


def growth(run: Run, images: Sequence[Path], work: Path, start: float) -> list[dict[str, float]]:
    """One process on a quarter, half, and all: seconds an image that the start does not explain."""
    rows = []
    for parts in (4, 2, 1):
        count = max(FEW + 1, len(images) // parts)
        some = folder_of(images[:count], work / f"first-{count}")
        seconds = timed(run, some, work, {"processes": 1})
        each = (seconds - start) / max(1, count - FEW)
        rows.append({"images": count, "seconds": round(seconds, 2), "seconds_an_image": round(each, 4)})
    return rows


def timed(run: Run, images: Path, work: Path, options: Mapping[str, Any]) -> float:
    """Seconds of a run from nothing."""
    out = work / "out"
    shutil.rmtree(out, ignore_errors=True)
    started = time.perf_counter()
    run(ImageSource(images), out, RunConfig(per_shard=PER_SHARD, device="cpu", progress=False, **options))
    return time.perf_counter() - started


def take(source: Path, target: Path, limit: int) -> list[Path]:
    """The first `limit` images, copied."""
    names = sorted(path for path in source.rglob("*") if path.suffix.lower()[1:] in IMAGE_SUFFIXES)[:limit]
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
        "vesl": VeslConfig(owl, "nano", detector_size=sizes.detector, max_new_tokens=sizes.new_tokens),
        "granular": GranularConfig(
            clip,
            owl,
            str(tags),
            captioner="nano",
            max_new_tokens=sizes.new_tokens,
            min_tag_score=-1,
            detector_size=sizes.detector,
            image_min_edge=1,
        ),
    }

    def engine_run(name: str) -> Run:
        return lambda source, out, run: label_images(find_engine(name), settings[name], source, out, run)

    objects = ObjectsConfig(tower, "segments", image_min_edge=1, box_min_edge=32)
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
