"""How good the labels are that need no downloaded weights, against what people drew and typed.

    regiontower bench label-quality --data DATA --json

DATA holds `ocr/val.jsonl` and `natural/{train,val}.jsonl` in the `xywh_jsonl` layout.

- `rice-ocr`: of its boxes and of people's lines, those that have a partner (IoU at least 0.5, each used once, best
  first), and of these pairs the share whose texts are equal, as typed, and without regard to case and spaces.
- `rice-objects`: the share of people's boxes that a region of the engine meets (IoU at least 0.5), in two ways: with
  record boxes (what is lost is lost by the engine's filters), and with segments, by the best N of them; for all boxes,
  and for those of at least 128 px after the filter that the engine applies.
- `clusters`: people's boxes of `natural/train.jsonl` (nothing is trained here, and there are more of them), clustered
  by features of --tower as the engine does it: purity and normalised mutual information against people's categories,
  beside the same clusters dealt out at random, and beside those of a tower with random weights.
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torchvision.ops import box_iou
from tqdm import tqdm
from transformers import CLIPVisionConfig, CLIPVisionModel

from regiontower.benchmarks._command import typed
from regiontower.benchmarks._stamp import stamp
from regiontower.train_stages.cluster_quality import cluster_quality
from regiontower.train_stages.label import ImageSource, RunConfig
from regiontower.train_stages.label.centres import KMeansConfig
from regiontower.train_stages.label.labeller import Labelled, Workplace
from regiontower.train_stages.label.object_clusters import label_objects
from regiontower.train_stages.label.objects import ObjectsConfig
from regiontower.train_stages.label.ocr import OcrConfig, OcrLabeller
from regiontower.train_stages.label.region_filters import min_edge, suppress
from regiontower.train_stages.label.segments import segment_boxes
from regiontower.train_stages.record_io import load_record_image, read_records
from regiontower.train_stages.records import Record, Region

IOU = 0.5
COUNTS = (10, 32, 100, 1000)
LARGE = 128.0  # pixels, RICE's shortest side of a region
SHUFFLES = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the parts")
    parser.add_argument("--limit", type=int, help="at most so many images a part")
    parser.add_argument("--tower", default="nano", help="whose features are clustered")
    parser.add_argument("--clusters", type=int, default=40)
    parser.add_argument("--json", action="store_true", help="the result alone on the last line")
    arguments = parser.parse_args()
    data, limit = arguments.data, arguments.limit
    results = {
        "rice-ocr": ocr_quality(data, limit),
        "rice-objects": {
            "record_boxes": record_recall(data, limit, arguments.tower),
            "segments": segment_quality(data, limit),
        },
        "clusters": cluster_figures(data, limit, arguments.tower, arguments.clusters),
        "command": typed("label-quality", parser, arguments),
        **stamp({}),
    }
    print(json.dumps(results) if arguments.json else json.dumps(results, indent=2))


def ocr_quality(data: Path, limit: int | None) -> dict[str, float]:
    """Precision and recall of boxes, and how many of the matched texts are equal."""
    records = read_records(data / "ocr" / "val.jsonl", "xywh_jsonl", data)
    labeller = OcrLabeller(OcrConfig(), Workplace())
    lines = boxes = pairs = equal = alike = 0
    for record in tqdm(records.records[:limit], "rice-ocr"):
        image = load_record_image(records.root, record)
        (found,) = labeller.label([image], [record.model_copy(update={"regions": []})])
        regions = found.record.regions if isinstance(found, Labelled) else []
        matched = match(record.regions, regions)
        lines, boxes, pairs = lines + len(record.regions), boxes + len(regions), pairs + len(matched)
        for line, read in matched:
            equal += line.ocr == read.ocr
            alike += folded(line.ocr) == folded(read.ocr)
    return {
        "lines": lines,
        "boxes": boxes,
        "box_precision": round(pairs / boxes, 4),
        "box_recall": round(pairs / lines, 4),
        "exact_text": round(equal / pairs, 4),
        "exact_text_folded": round(alike / pairs, 4),
        "lines_read_exactly": round(equal / lines, 4),
    }


def match(drawn: Sequence[Region], found: Sequence[Region]) -> list[tuple[Region, Region]]:
    """Pairs of IoU at least 0.5, greedily from the best; each region once."""
    if not drawn or not found:
        return []
    overlap = overlaps(drawn, [region.box_xyxy for region in found])
    pairs = []
    for place in overlap.flatten().argsort(descending=True).tolist():
        row, column = divmod(place, len(found))
        if overlap[row, column] >= IOU:
            pairs.append((drawn[row], found[column]))
            overlap[row], overlap[:, column] = -1, -1
    return pairs


def record_recall(data: Path, limit: int | None, tower: str) -> dict[str, Any]:
    """Recall of people's boxes by those of them that get a cluster with the engine's default filters."""
    drawn, met_by_large = [], []
    for before, after in clustered(data, "val", limit, ObjectsConfig(tower, "record", feature="region"), 1):
        kept = [region.box_xyxy for region in after.regions if region.cluster is not None] if after else []
        drawn += before.regions
        met_by_large += any_meets(before.regions, kept)
    large = [found for region, found in zip(drawn, met_by_large, strict=True) if min_edge(region.box_xyxy) >= LARGE]
    return {
        "all": {"boxes": len(drawn), "recall": mean(met_by_large)},
        "large": {"boxes": len(large), "recall": mean(large)},
    }


def segment_quality(data: Path, limit: int | None) -> dict[str, dict[str, float]]:
    """Recall of people's boxes by the best N segments."""
    records = read_records(data / "natural" / "val.jsonl", "xywh_jsonl", data)
    hits: dict[str, list[list[bool]]] = {"all": [], "large": []}
    for record in tqdm(records.records[:limit], "segments"):
        boxes, scores = segment_boxes(load_record_image(records.root, record))
        every = [tuple(map(float, box)) for box in boxes]
        large = [index for index, box in enumerate(every) if min_edge(box) >= LARGE]
        drawn = [region for region in record.regions if min_edge(region.box_xyxy) >= LARGE]
        hits["all"] += met(record.regions, every, scores.tolist())
        hits["large"] += met(drawn, [every[i] for i in large], [float(scores[i]) for i in large])
    return {
        name: {"boxes": len(rows), **{f"recall_at_{n}": mean([row[i] for row in rows]) for i, n in enumerate(COUNTS)}}
        for name, rows in hits.items()
    }


def cluster_figures(data: Path, limit: int | None, tower: str, clusters: int) -> dict[str, Any]:
    """Clusters of people's boxes of at least 32 px against their categories."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        sizes = {"hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 6}
        CLIPVisionModel(CLIPVisionConfig(**sizes, patch_size=14, image_size=112)).save_pretrained(folder)
        for name, source in ((tower, tower), ("random weights", folder)):
            config = ObjectsConfig(source, "record", image_min_edge=1, box_min_edge=32, nms_iou=1.0, max_regions=1000)
            records = [after for _, after in clustered(data, "train", limit, config, clusters) if after is not None]
            found[name] = {**rounded(cluster_quality(records)), "shuffled": shuffled(records)}
    return found


def clustered(
    data: Path, split: str, limit: int | None, config: ObjectsConfig, clusters: int
) -> list[tuple[Record, Record | None]]:
    """Records of the photographs, each with what `rice-objects` makes of it; None where it leaves it out."""
    path = data / "natural" / f"{split}.jsonl"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "val.jsonl"
        source.write_text("\n".join(path.read_text("utf-8").splitlines()[:limit]) + "\n", encoding="utf-8")
        before = read_records(source, "xywh_jsonl", data)
        run = RunConfig(device="cpu", progress=False)
        images = ImageSource(source, "xywh_jsonl", data)
        result = label_objects(config, KMeansConfig(clusters), images, Path(folder) / "out", run)
        after = {Path(r.image).name: r for shard in result.shards for r in read_records(shard).records}
    return [(record, after.get(Path(record.image).name)) for record in before.records]


def shuffled(records: Sequence[Record]) -> dict[str, float]:
    """The mean purity and NMI of the same cluster sizes, dealt out at random."""
    rng = np.random.default_rng(0)
    held = [region.cluster for record in records for region in record.regions]
    places = [place for place, cluster in enumerate(held) if cluster is not None]
    rows = []
    for _ in range(SHUFFLES):
        dealt = iter(rng.permutation([cluster for cluster in held if cluster is not None]).tolist())
        new = {place: next(dealt) for place in places}
        start, moved = 0, []
        for record in records:
            regions = [
                region.model_copy(update={"cluster": new.get(place)})
                for place, region in enumerate(record.regions, start)
            ]
            start += len(regions)
            moved.append(record.model_copy(update={"regions": regions}))
        rows.append(cluster_quality(moved))
    return {name: round(float(np.mean([row[name] for row in rows])), 4) for name in ("purity", "nmi")}


def rounded(quality: dict[str, float]) -> dict[str, float]:
    """Counts, purity and NMI."""
    names = ("regions", "names", "clusters", "purity", "nmi")
    return {name: round(quality[name], 4) for name in names if name in quality}


def met(drawn: Sequence[Region], boxes: list, scores: list[float]) -> list[list[bool]]:
    """For each drawn region whether one of the best N boxes meets it, for each N."""
    best = [boxes[index] for index in suppress(boxes, scores, None, 0.7)]
    if not drawn or not best:
        return [[False] * len(COUNTS) for _ in drawn]
    overlap = overlaps(drawn, best)
    return [[bool((row[:count] >= IOU).any()) for count in COUNTS] for row in overlap]


def any_meets(drawn: Sequence[Region], boxes: Sequence) -> list[bool]:
    """For each drawn region whether one of the boxes meets it."""
    if not drawn or not boxes:
        return [False] * len(drawn)
    return (overlaps(drawn, boxes) >= IOU).any(dim=1).tolist()


def overlaps(drawn: Sequence[Region], boxes: Sequence) -> torch.Tensor:
    """IoU `(D, B)`."""
    return box_iou(torch.tensor([region.box_xyxy for region in drawn]), torch.tensor(boxes))


def folded(text: str | None) -> str:
    """Without case and spaces."""
    return "".join((text or "").casefold().split())


def mean(values: Sequence[bool]) -> float:
    return round(sum(values) / len(values), 4) if values else 0.0


if __name__ == "__main__":
    main()
