"""`regiontower segment`: semantic and panoptic segmentation with a frozen tower, a few tuned parameters and a head."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from ...mllm.boxes import mean_colour
from ...mllm.load import resolve_device
from ...train_stages.pixels import PixelCache
from ...train_stages.record_io import read_records
from ...train_stages.records import Record
from ...train_stages.region_labels import open_tokenizer
from ...vision_towers import UserError, describe_tower
from ..probe.lit import LitConfig
from ..probe.prompts import PLACE, class_texts
from ..probe.run import split
from ..probe.text_side import open_with_texts
from ..probe.views import checked_side
from .figures import of_classes, panoptic_counts, panoptic_figures, semantic_counts, semantic_figures
from .label_maps import ClassSource, SegmentClasses, panoptic_map
from .pictures import segment_sheet
from .segmenter import Segmenter, SegmenterConfig, save_segmenter
from .text_space import TextSpace, lit_text_space, own_text_space
from .train import TrainConfig, train_segmenter

PICTURES = 6


@dataclass(frozen=True)
class SegmentConfig:
    """segmenter, train: what learns, and how. labels: what a class is, "category" or "tags" (tags and category).
    held_out: classes that training does not see. background: the class of unlabelled pixels, as VOC has one; they are
    void when absent. side: pixels of the letterboxed square; the tower's own when absent. templates: of the texts of
    classes, with a `{}` each. lit: train a text tower first."""

    segmenter: SegmenterConfig
    train: TrainConfig
    labels: ClassSource = "category"
    held_out: tuple[str, ...] = ()
    background: str | None = None
    side: int | None = None
    templates: tuple[str, ...] = (PLACE,)
    lit: LitConfig | None = None

    def __post_init__(self) -> None:
        if self.segmenter.task == "panoptic" and not self.train.steps:
            raise UserError("a panoptic head has to learn what a mask is; give --steps of 1 or more.")
        if self.segmenter.tuning != "none" and not self.train.steps:
            raise UserError(f"tuning {self.segmenter.tuning!r} is learned; give --steps of 1 or more.")


def measure_segmentation(
    tower: str | Path,
    data: str | Path,
    test: str | Path | None = None,
    *,
    config: SegmentConfig,
    out: str | Path | None = None,
    tokenizer: str | Path | None = None,
    format: str = "records",
    image_root: str | Path | None = None,
    device: str = "auto",
    cache_dir: str | Path | None = None,
) -> dict[str, Any]:
    """Train a head on the masks of region records, and measure it on others, in pixels of their original images.

    Args:
        tower: a `umg_clip` run, a native CLIP or SigLIP, or a `clip` run on CLIP or MLCD; with `config.lit` any CLIP,
            MLCD or SigLIP tower, and `tokenizer` the one of its texts.
        data, test: as in `probe`: without `test`, the records of `data` that are not of its training split.
        out: folder for `segmentation.json`, `segmentation.png` (image, truth, answer) and `segmenter.safetensors`
            (`save_segmenter`); nothing is written without it. cache_dir: as in `probe`.
    Returns:
        `{"tower", "task", "tuning", "steps", "classes", "learned_parameters", ..., "figures": {figure: {"value",
        "classes", "ci95"}}, "by_class": {name: {...}}}`. Candidates are all classes of `data` and `test`. Figures:
        `miou`, `pixel_accuracy`, and `miou_constant`, what the best answer that is the same everywhere gets; or
        `pq`, `sq`, `rq`, `pq_things`, `pq_stuff`. After training that did not see all classes also `miou_seen` and
        `miou_unseen`, or `pq_...`: the means over the classes that it saw, and over the others.
    Raises:
        UserError: a tower, records or classes that cannot work.
    """
    if config.lit is not None and tokenizer is None:
        raise UserError("a text tower is trained on the tokens of a tokenizer; give --tokenizer.")
    model, texts_of_it = open_with_texts(tower, resolve_device(device))
    if config.lit is None:
        own_text_space(model, texts_of_it)  # says now that it has none
    spec = describe_tower(model.config)
    side = checked_side(config.side, spec)
    if side % spec.patch_size:
        raise UserError(f"{side} px is no whole number of patches of {spec.patch_size} px; give --side.")
    records = read_records(data, format, image_root)
    parts = (records, read_records(test, format, image_root)) if test is not None else split(records)
    classes = SegmentClasses.of([r for part in parts for r in part.records], config.labels, config.background)
    hidden = set(classes.numbers(config.held_out))
    learned = [number for number in sorted(_occurring(parts[0].records, classes)) if number not in hidden]
    known, asked = (PixelCache.build(part, side, cache_dir, fill=mean_colour(spec.image_mean)) for part in parts)

    if config.lit is None:
        space = own_text_space(model, texts_of_it)
    else:
        space = lit_text_space(
            model,
            known,
            lambda region: classes.name_of(region) not in config.held_out,
            open_tokenizer(str(tokenizer)),
            config.lit,
        )
    texts = _class_texts(space, classes.names, config.templates)
    segmenter = train_segmenter(space, config.segmenter, known, classes, learned, texts, config.train)

    shown = np.linspace(0, len(asked) - 1, min(PICTURES, len(asked))).round().astype(int).tolist()
    semantic = config.segmenter.task == "semantic"
    count = semantic_counts if semantic else panoptic_counts
    counts, answers = [], {}
    for row, record in enumerate(tqdm(asked.records, "segmenting", unit="img")):
        answer = segmenter.segments(asked.pixels[row], asked.frames[row], texts, classes.stuff)
        counts.append(count(panoptic_map(record, classes), answer, len(classes)))
        answers |= {row: answer} if row in shown else {}
    groups: dict[str, Sequence[int]] = {}
    unseen = [number for number in range(len(classes)) if number not in learned]
    if config.train.steps and unseen:
        groups = {"seen": learned, "unseen": unseen}
    if semantic:
        figures = semantic_figures(np.stack(counts), groups)
    else:
        groups["things"] = [n for n, stuff in enumerate(classes.stuff) if not stuff]
        groups["stuff"] = [n for n, stuff in enumerate(classes.stuff) if stuff]
        figures = panoptic_figures(np.stack(counts), groups)
    results = {
        "tower": str(tower),
        "task": config.segmenter.task,
        "tuning": config.segmenter.tuning,
        "steps": config.train.steps,
        "labels": config.labels,
        "side": side,
        "classes": len(classes),
        "held_out": list(config.held_out),
        "background": config.background,
        "templates": len(config.templates),
        "lit_steps": None if config.lit is None else config.lit.steps,
        "learned_parameters": _size(segmenter) if config.train.steps else 0,
        "train_images": len(known),
        "test_images": len(asked),
        "figures": figures,
        "by_class": of_classes(np.stack(counts), classes.names),
    }
    if out is not None:
        folder = Path(out)
        folder.mkdir(parents=True, exist_ok=True)
        truths = [panoptic_map(asked.records[row], classes) for row in shown]
        sheet = segment_sheet(asked, shown, truths, [answers[row] for row in shown], classes.names)
        sheet.save(folder / "segmentation.png")
        save_segmenter(segmenter, folder / "segmenter.safetensors")
        (folder / "segmentation.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return results


def segmentation_table(results: dict[str, Any]) -> str:
    """The figures in lines, for reading."""
    head = (
        f"{results['tower']}: {results['task']}, tuning {results['tuning']}, {results['steps']} steps, "
        f"{results['learned_parameters']:,} learned parameters, {results['classes']} classes ({results['labels']}), "
        f"{results['train_images']} images to learn from, {results['test_images']} to be tested on"
    )
    lines = []
    for name, found in results["figures"].items():
        spread = "[{:.3f}, {:.3f}]".format(*found["ci95"]) if "ci95" in found else ""
        lines.append(f"{name:16s} {found['value']:.3f} {spread:16s} {found['classes']} classes")
    return "\n".join([head, *lines])


def _class_texts(space: TextSpace, names: Sequence[str], templates: Sequence[str]) -> torch.Tensor:
    # A copy: what is made in inference mode cannot take part in training.
    return class_texts(space.texts, names, templates).clone().to(space.tower.device)


def _occurring(records: Sequence[Record], classes: SegmentClasses) -> set[int]:
    found = {classes.background} if classes.background is not None else set()
    for record in records:
        labels = zip(record.regions, classes.objects.labels(record), strict=True)
        found |= {label for region, label in labels if region.mask is not None and label >= 0}
    return found


def _size(segmenter: Segmenter) -> int:
    return sum(value.numel() for value in segmenter.learned().values())
