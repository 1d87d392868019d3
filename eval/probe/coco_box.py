"""The two protocols of "COCO box classification", which have one name in the literature and are not comparable.

`clipself-macc` (CLIPSelf, arXiv 2310.01403): panoptic records, things and stuff. All categories are candidates, of
things and of stuff for either; regions whose box has an area of 8^2 to 1024^2 px of the original; the longest
side of an image at 1024 px (patches of 16 px) or 896 px (of 14), black to the right and below. Mean over classes of
top-1 and top-5: boxes of things, masks of things, masks of stuff, read by `by_unit_tokens` where the readout has dense
features, and things cut out with their box enlarged 1.5 times. A crowd of things is a thing, by its category.

`fgclip-acc` (FG-CLIP, arXiv 2505.05071): instances. The categories of things are the candidates, boxes of any size, the
whole image at the tower's size. Share of all boxes, top-1 and top-5.

The papers' candidates are those of the data set: COCO's 133 or 80, LVIS's 1203. Records say only which ones occur in
them, and fewer candidates are easier: a file of names (`classes`) says what the candidates are.

Texts of both are means over prompt templates. All of `clipself-macc` is read from CLIPSelf's code (training/data.py,
zero_shot.py); its masks are scaled to the patches bilinearly, ours are exact, which differs at a mask's edge. That the
whole image of `fgclip-acc` is stretched to its square is ours.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from ...mllm.load import resolve_device
from ...train_stages.pixels import PixelCache
from ...train_stages.record_io import RecordSet, read_records
from ...train_stages.records import Record, Region
from ...train_stages.region_labels import NO_CLASS
from ...vision_towers import TowerSpec, UmgClipVisionModel, UserError, describe_tower, resize_tower
from .classify import Share
from .enlarged_crops import enlarged_crops
from .mask_regions import dense_tower
from .prompts import TEMPLATES, class_texts, read_classes
from .ranked import class_mean_top, micro_top, ranks
from .regions import CROPS, Labels, ProbeRegions, labelled_regions, reader
from .table import figure_lines
from .table import rows as json_rows
from .text_side import TextSide, open_with_texts, unit
from .unit_tokens import by_unit_tokens
from .views import checked_side, cornered, stretched
from .zero_shot import in_space

Protocol = Literal["clipself-macc", "fgclip-acc"]
CLIPSELF, FGCLIP = "clipself-macc", "fgclip-acc"

MIN_AREA, MAX_AREA = 8**2, 1024**2  # px^2 of the original image, both included
# The longest side by the patch's side, in px: 64 patches, as in CLIPSelf's code for B/16 and L/14
# (github.com/wusize/CLIPSelf, scripts/test_eva_vit*_macc_boxes_masks.sh, --det-image-size). It has no other patches.
CLIPSELF_SIDES = {16: 1024, 14: 896}
OTHER_SIDE = 1024
ENLARGED = 1.5
BLACK = (0, 0, 0)
IMAGES_AT_ONCE = 128  # decoded ones in memory: 400 MB at 1024 px


@dataclass(frozen=True)
class CocoBoxConfig:
    """readouts: of `regions.READOUTS`, those that lie in the space of the texts; not "crops". side: pixels of the
    square; when absent the protocol's, or the tower's own where it takes no other. A tower that takes one size only is
    resized to `side`. templates: with a `{}` each. classes: a file of the candidates' names (`read_classes`), for
    `clipself-macc` of things and of stuff; when absent, the categories that occur in the records."""

    protocol: Protocol
    readouts: tuple[str, ...] = ("own",)
    side: int | None = None
    templates: tuple[str, ...] = TEMPLATES
    classes: str | Path | None = None


def classify_coco_boxes(
    tower: str | Path,
    data: str | Path,
    config: CocoBoxConfig,
    *,
    out: str | Path | None = None,
    format: str = "records",
    image_root: str | Path | None = None,
    device: str = "auto",
) -> dict[str, Any]:
    """Classify the regions of `data` by a protocol; nothing is learned.

    Args:
        tower: with texts, as in `open_with_texts`.
        data: region records with categories; a category that is never without `stuff` is stuff, masks are optional.
        out: folder for `PROTOCOL.json`; nothing is written without it.
    Returns:
        `{"tower", "protocol", "side", "resized_from", "classes", "classes_from", "templates", "images", "readouts":
        {readout: {figure: {"value", "n", "ci95"}}}}`. `resized_from`: pixels of the size that the tower was made for
        where it was resized, else None. `classes`: how many candidates; `classes_from`: their file, or "records".
        Figures of `clipself-macc`, means over classes: `things_boxes_top1`, `things_masks_top1`,
        `stuff_masks_top1`, and of the readout `crops` `things_crops_top1`; of `fgclip-acc`, shares of all boxes:
        `boxes_top1`; each also as top5. Masks are read where the readout has dense features, crops where the pooled
        output lies in the space of the texts.
    Raises:
        UserError: a tower without texts, a readout outside of their space, a protocol that there is not, a side that
            cuts patches, records without a region of a category that the protocol counts, or a file of candidates that
            lacks one of them.
    """
    if config.protocol not in _LOOKS:
        raise UserError(f"there is no protocol {config.protocol!r}; choose {' or '.join(_LOOKS)}.")
    on = resolve_device(device)
    model, side = open_with_texts(tower, on)
    if side is None:
        raise UserError(f"{str(tower)!r} has no texts to compare regions with; a protocol needs a tower with texts.")
    usable = [name for name in side.regions if name != CROPS]
    for name in config.readouts:
        if name not in usable:
            raise UserError(f"a protocol cannot read by {name!r}; this tower's texts go with {', '.join(usable)}.")
    records = read_records(data, format, image_root)
    names = candidates(records.records, config.protocol, config.classes)
    spec = describe_tower(model.config)
    pixels = config.side or protocol_side(config.protocol, spec)
    seeing = _tower_for(pixels, tower, model, on)
    things = frozenset(r.category for record in records.records for r in record.regions if not r.stuff)
    crops = model if CROPS in side.regions else None
    look = _Look(seeing, names, things, pixels, config.readouts, side, crops)
    texts = class_texts(side.texts, names, config.templates)
    rows: dict[tuple[str, str], list[_Ranked]] = {}
    with tqdm(total=len(records), desc=config.protocol, unit="img") as bar:
        for start in range(0, len(records), IMAGES_AT_ONCE):
            part = replace(records, records=records.records[start : start + IMAGES_AT_ONCE])
            for (readout, what), regions in _LOOKS[config.protocol](look, part).items():
                if len(regions):
                    ranked = ranks(unit(torch.from_numpy(regions.features)) @ texts.T, regions.classes)
                    found = _Ranked(ranked, regions.images + start, regions.classes)
                    rows.setdefault((readout, what), []).append(found)
            bar.update(len(part))
    if not rows:
        raise UserError(f"{data} has no region that {config.protocol} counts; docs/probe.md says which it does.")
    figures: dict[str, dict[str, Share]] = {}
    for (readout, what), found in rows.items():
        of_all = _figures(found, config.protocol)
        figures.setdefault(readout, {}).update({f"{what}_{name}": value for name, value in of_all.items()})
    results = {
        "tower": str(tower),
        "protocol": config.protocol,
        "side": pixels,
        "resized_from": None if seeing is model else spec.image_size,
        "classes": len(names),
        "classes_from": "records" if config.classes is None else str(config.classes),
        "templates": len(config.templates),
        "images": len(records),
        "readouts": {name: json_rows(found) for name, found in figures.items()},
    }
    if out is not None:
        Path(out).mkdir(parents=True, exist_ok=True)
        text = json.dumps(results, indent=2) + "\n"
        (Path(out) / f"{config.protocol}.json").write_text(text, encoding="utf-8")
    return results


def coco_box_table(results: dict[str, Any]) -> str:
    """The figures in lines, for reading."""
    resized = f" (resized from {results['resized_from']})" if results["resized_from"] else ""
    whose = "that occur in the records" if results["classes_from"] == "records" else f"of {results['classes_from']}"
    head = (
        f"{results['tower']}: {results['protocol']} at {results['side']} px{resized}, {results['classes']} classes "
        f"{whose} by {results['templates']} templates, {results['images']} images"
    )
    return "\n".join([head, *figure_lines(results["readouts"])])


def candidates(records: Sequence[Record], protocol: Protocol, classes: str | Path | None = None) -> list[str]:
    """The classes that a region may have: those of the file `classes`, in its order; without one all categories that
    occur, or with `fgclip-acc` those of things, sorted.

    Raises:
        UserError: no category occurs, or one that the file lacks.
    """
    regions = [region for record in records for region in record.regions if protocol == CLIPSELF or not region.stuff]
    occurring = sorted({region.category for region in regions if region.category is not None})
    if not occurring:
        raise UserError("no region of the records has a category; a protocol needs them.")
    if classes is None:
        return occurring
    names = list(read_classes(classes))
    absent = sorted(set(occurring) - set(names))
    if absent:
        raise UserError(
            f"{classes} lacks {len(absent)} of the {len(occurring)} categories that occur in the records, e.g. "
            f"{absent[0]!r}; name every candidate as the records do, one a line."
        )
    return names


def in_area(region: Region) -> bool:
    """Whether the area of its box is in [8^2, 1024^2] px of the original image."""
    x0, y0, x1, y1 = region.box_xyxy
    return MIN_AREA <= (x1 - x0) * (y1 - y0) <= MAX_AREA


def labels_of(names: Sequence[str], wanted: Callable[[Region], bool]) -> Labels:
    """The place in `names` of the category of regions that are `wanted`; `NO_CLASS` for the rest."""
    ids: dict[str | None, int] = {name: number for number, name in enumerate(names)}
    return lambda record: [
        ids.get(region.category, NO_CLASS) if wanted(region) else NO_CLASS for region in record.regions
    ]


@dataclass(frozen=True)
class _Look:
    """What a protocol looks at. names: the candidates. things: categories of things. crops: what reads crops, if
    anything does."""

    model: PreTrainedModel
    names: list[str]
    things: frozenset[str | None]
    pixels: int
    readouts: Sequence[str]
    side: TextSide
    crops: PreTrainedModel | None


# Regions, in the space of the texts, by the readout that read them and by what they are, for some of the images.
Seen = dict[tuple[str, str], ProbeRegions]


def _clipself(look: _Look, part: RecordSet) -> Seen:
    cache = cornered(part, look.pixels, BLACK)
    things = labels_of(look.names, lambda region: region.category in look.things and in_area(region))
    stuff = labels_of(look.names, lambda region: region.category not in look.things and in_area(region))
    found: Seen = {}
    for name in look.readouts:
        dense = dense_tower(look.model, name)
        if dense is None:
            found[name, "things_boxes"] = _read(look, name, cache, things)
            continue
        wanted = {"things_boxes": things, "things_masks": things, "stuff_masks": stuff}
        seen = by_unit_tokens(dense, look.side.regions[name], cache, wanted)
        found |= {(name, what): regions for what, regions in seen.items()}
    if look.crops is not None:
        crops = enlarged_crops(look.crops, part, cache, things, ENLARGED, BLACK)
        found[CROPS, "things_crops"] = _in_space(crops, look.side, CROPS)
    return found


def _fgclip(look: _Look, part: RecordSet) -> Seen:
    cache, labels = stretched(part, look.pixels), labels_of(look.names, lambda region: not region.stuff)
    return {(name, "boxes"): _read(look, name, cache, labels) for name in look.readouts}


def _read(look: _Look, readout: str, cache: PixelCache, labels: Labels) -> ProbeRegions:
    regions = labelled_regions(reader(look.model, readout), cache, labels, progress=None)
    return _in_space(regions, look.side, readout)


def _in_space(regions: ProbeRegions, side: TextSide, readout: str) -> ProbeRegions:
    return replace(regions, features=in_space(regions, side, readout).numpy()) if len(regions) else regions


_LOOKS: dict[str, Callable[[_Look, RecordSet], Seen]] = {CLIPSELF: _clipself, FGCLIP: _fgclip}


class _Ranked(NamedTuple):
    """For each region how many classes are nearer than its own, its image and its class, `(N,)`."""

    ranks: np.ndarray
    images: np.ndarray
    classes: np.ndarray


def _figures(rows: Sequence[_Ranked], protocol: str) -> dict[str, Share]:
    """Top-1 and top-5 as the protocol counts them."""
    ranked, images, classes = (np.concatenate(parts) for parts in zip(*rows, strict=True))
    return class_mean_top(ranked, images, classes) if protocol == CLIPSELF else micro_top(ranked, images)


def protocol_side(protocol: Protocol, spec: TowerSpec) -> int:
    """Pixels of the square: the protocol's, in whole patches; the tower's own where it takes no other, and with
    `fgclip-acc`."""
    if protocol == FGCLIP or not spec.any_resolution:
        return spec.image_size
    return CLIPSELF_SIDES.get(spec.patch_size, OTHER_SIDE // spec.patch_size * spec.patch_size)


def _tower_for(pixels: int, tower: str | Path, model: PreTrainedModel, device: str) -> PreTrainedModel:
    """What reads squares of `pixels`: `model`, or where that takes another size only, the same `tower` once more with
    its table of positions interpolated. `model` stays as it is: crops are made to its size."""
    spec = describe_tower(model.config)
    if spec.any_resolution or pixels == spec.image_size:
        checked_side(pixels, spec)
        return model
    resized: Any = resize_tower(open_with_texts(tower, device)[0], pixels)
    if isinstance(resized, UmgClipVisionModel):
        resized.new_readout(resized.device, resized.dtype)  # lets the blocks of the new tower give dense features
    return resized.eval()
