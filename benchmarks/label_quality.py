"""How good the labels are that need no downloaded weights, against what people drew and typed.

    regiontower bench label-quality --data DATA [--limit N] --json

DATA holds `ocr/val.jsonl` and `natural/val.jsonl` in the `xywh_jsonl` layout. `rice-ocr`: of its boxes and of people's
lines, those that have a partner (IoU at least 0.5, each used once, best first), and of these pairs the share
whose texts are equal, as typed, and without regard to case and spaces. Segments: the share of people's boxes that one
of the best N proposals meets (IoU at least 0.5), for all boxes and for those of at least 128 px, after the filter that
`rice-objects` applies.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torchvision.ops import box_iou
from tqdm import tqdm

from regiontower.benchmarks._stamp import stamp
from regiontower.train_stages.label.labeller import Labelled, Workplace
from regiontower.train_stages.label.ocr import OcrConfig, OcrLabeller
from regiontower.train_stages.label.region_filters import min_edge, suppress
from regiontower.train_stages.label.segments import segment_boxes
from regiontower.train_stages.record_io import load_record_image, read_records
from regiontower.train_stages.records import Region

IOU = 0.5
COUNTS = (10, 32, 100, 1000)
LARGE = 128.0  # pixels, RICE's shortest side of a region


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the parts")
    parser.add_argument("--limit", type=int, help="at most so many images a part")
    parser.add_argument("--json", action="store_true", help="the result alone on the last line")
    arguments = parser.parse_args()
    results = {
        "rice-ocr": ocr_quality(arguments.data, arguments.limit),
        "segments": segment_quality(arguments.data, arguments.limit),
        "command": "regiontower bench label-quality --data DATA --json",
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
        for typed, read in matched:
            equal += typed.ocr == read.ocr
            alike += folded(typed.ocr) == folded(read.ocr)
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


def segment_quality(data: Path, limit: int | None) -> dict[str, dict[str, float]]:
    """Recall of people's boxes by the best N proposals."""
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


def met(drawn: Sequence[Region], boxes: list, scores: list[float]) -> list[list[bool]]:
    """For each drawn region whether one of the best N boxes meets it, for each N."""
    best = [boxes[index] for index in suppress(boxes, scores, None, 0.7)]
    if not drawn or not best:
        return [[False] * len(COUNTS) for _ in drawn]
    overlap = overlaps(drawn, best)
    return [[bool((row[:count] >= IOU).any()) for count in COUNTS] for row in overlap]


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
