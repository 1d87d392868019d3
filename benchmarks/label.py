"""Images a second of the label engines that need no downloaded weights, with one process and with two.

    regiontower bench label --images FOLDER [--limit 64] [--processes 1 2] --json

`rice-ocr` reads with rapidocr's own weights; `rice-objects` proposes segments and clusters the crops' features of a
random ViT-B/16 (its time does not depend on its weights). The start of processes and models is part of the time: it is
given apart, measured on two images.
"""

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from transformers import CLIPVisionConfig, CLIPVisionModel

from regiontower.benchmarks._stamp import stamp
from regiontower.train_stages.label import ImageSource, RunConfig, find_engine, label_images
from regiontower.train_stages.label.object_clusters import KMeansConfig, label_objects
from regiontower.train_stages.label.objects import ObjectsConfig
from regiontower.train_stages.label.ocr import OcrConfig
from regiontower.train_stages.webdataset import IMAGE_SUFFIXES

Run = Callable[[ImageSource, Path, RunConfig], object]
PER_SHARD = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="folder of images")
    parser.add_argument("--limit", type=int, default=64, help="the first so many")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--json", action="store_true", help="the result alone on the last line")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        few, all_of_them = folder / "few", folder / "images"
        count = take(arguments.images, all_of_them, arguments.limit)
        take(arguments.images, few, 2)
        found = {}
        for name, run in engines(folder).items():
            found[name] = {}
            for processes in arguments.processes:
                start = timed(run, few, folder / "out", processes)
                seconds = timed(run, all_of_them, folder / "out", processes)
                found[name][str(processes)] = {
                    "images_per_second": round(count / seconds, 3),
                    "start_seconds": round(start, 1),
                }
    results = {
        "engines": found,
        "images": count,
        "command": f"regiontower bench label --images FOLDER --limit {arguments.limit} --json",
        **stamp({}),
    }
    print(json.dumps(results) if arguments.json else json.dumps(results, indent=2))


def engines(folder: Path) -> dict[str, Run]:
    """Name -> a function that labels a source into a folder."""
    CLIPVisionModel(CLIPVisionConfig(patch_size=16)).save_pretrained(folder / "tower")
    objects = ObjectsConfig(str(folder / "tower"), proposals="segments", image_min_edge=1, box_min_edge=32)
    return {
        "rice-ocr": lambda source, out, run: label_images(find_engine("rice-ocr"), OcrConfig(), source, out, run),
        "rice-objects": lambda source, out, run: label_objects(objects, KMeansConfig(1), source, out, run),
    }


def take(source: Path, target: Path, limit: int) -> int:
    """Copy the first `limit` images; returns how many there are."""
    names = sorted(path for path in source.rglob("*") if path.suffix.lower()[1:] in IMAGE_SUFFIXES)[:limit]
    target.mkdir()
    for number, path in enumerate(names):
        shutil.copy(path, target / f"{number:05d}{path.suffix}")
    return len(names)


def timed(run: Run, images: Path, out: Path, processes: int) -> float:
    """Seconds of a run from nothing."""
    shutil.rmtree(out, ignore_errors=True)
    started = time.perf_counter()
    run(ImageSource(images), out, RunConfig(per_shard=PER_SHARD, processes=processes, device="cpu", progress=False))
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
