"""`regiontower probe`: what the regions of a frozen tower are worth."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...mllm.boxes import mean_colour
from ...mllm.load import resolve_device
from ...train_stages.pixels import PixelCache
from ...train_stages.record_io import RecordSet, read_records
from ...train_stages.region_labels import NO_CLASS, ObjectClasses, ObjectLabels, open_tokenizer
from ...vision_towers import UserError, describe_tower
from ...vision_towers.packaged import model_source
from .classify import Share, linear, majority, nearest_neighbours
from .detection import DetectConfig, detection, detection_line
from .labels import object_classes, text_labels, transcripts, word_labels, words_of
from .lit import LitConfig, lit_image_texts, lit_texts
from .mask_regions import dense_tower, mask_regions
from .pictures import pca_sheet, similarity_sheet
from .reading import read_by_tokens, refuse_another_vocabulary, text_centres
from .regions import ProbeRegions, Reader, labelled_regions, reader, remembered
from .table import figure_lines
from .table import rows as json_rows
from .text_side import RegionTexts, TextSide, open_with_texts
from .views import checked_side
from .zero_shot import image_classes, image_retrieval, located, region_retrieval, zero_shot_classes

PICTURES = 6


@dataclass(frozen=True)
class ProbeConfig:
    """labels: what a class is: "category", "tags" (tags and category) or "cluster". readouts: of
    `regions.READOUTS`. side: pixels of the letterboxed square; the tower's own when absent. train_regions: about how
    many objects classifiers learn from; where there are more, images are taken evenly from all. lit: train a text tower
    for each readout, and for whole images; detect: train a detector; None: do not.
    templates: the text of a class, for `zero_shot`, `zero_shot_masks` and `image_zero_shot`, is the mean over these,
    with a `{}` each; its bare name when None."""

    labels: ObjectLabels = "category"
    readouts: tuple[str, ...] = ("own",)
    side: int | None = None
    train_regions: int = 30_000
    lit: LitConfig | None = None
    detect: DetectConfig | None = None
    templates: tuple[str, ...] | None = None


def probe(
    tower: str | Path,
    data: str | Path,
    test: str | Path | None = None,
    *,
    out: str | Path | None = None,
    tokenizer: str | Path | None = None,
    config: ProbeConfig | None = None,
    format: str = "records",
    image_root: str | Path | None = None,
    device: str = "auto",
    cache_dir: str | Path | None = None,
) -> dict[str, Any]:
    """Measure the regions of a frozen tower.

    Args:
        tower: what `load_tower` opens; a finished `pretrain` run brings its class centres and its texts along.
        data: region records that classifiers learn from. test: records they are tested on; without it, the records of
            `data` whose `split` is not "train", or every fifth one where no record says its split.
        out: folder for `probe.json` and pictures; nothing is written without it.
        tokenizer: of the text centres of a rice run, reading by them is left out without it; and of the text tower that
            `config.lit` trains.
        cache_dir: where decoded pixels are kept (`PixelCache`), for further probes; in memory when absent.
    Returns:
        `{"tower", "labels", "classes", "templates", "train_images", "test_images", "shared_images", "readouts":
        {readout: {figure: {"value", "n", "ci95", ...}}}, "images": {...}}`; `templates` is how many there are, 0 for
        bare names; `shared_images` how many of the test are learned from, too.
        Figures of a readout: `majority`, `knn`, `linear` (top-1 of objects), `reading_linear` (top-1 of transcripts
        that training has), and, where the tower has them, `reading_tokens`, `zero_shot`, `zero_shot_masks`,
        `text_to_region_r1` ..., and with `config.lit` `lit_zero_shot`, `lit_text_to_region_r1` ...; of whole images:
        `image_to_text_r1` ..., `image_to_text_all_r1` ..., `image_zero_shot_top1` ..., `text_box_acc50`, and with
        `config.lit` `lit_image_to_text_r1` ..., `lit_image_zero_shot_top1` .... With `config.detect` also
        `detection`, as `detection.detection` says.
    Raises:
        UserError: a tower, data or readout that cannot work, a tokenizer of another vocabulary than the run's, or
            nothing in the test that can be measured.
    """
    config = config or ProbeConfig()
    if config.lit is not None and tokenizer is None:
        raise UserError("a text tower is trained on the tokens of a tokenizer; give --tokenizer.")
    model, side = open_with_texts(tower, resolve_device(device))
    if config.templates is not None and side is None:
        raise UserError(f"{str(tower)!r} has no texts that prompt templates could be for; leave --templates out.")
    tokens = None if tokenizer is None else _tokenizer(tokenizer)
    centres = text_centres(model_source(tower))
    if tokens is not None and centres is not None and "own" in config.readouts:
        refuse_another_vocabulary(model_source(tower), tokens)
    readers = {name: remembered(reader(model, name)) for name in config.readouts}  # says now what it cannot read
    spec = describe_tower(model.config)
    fill, pixels = mean_colour(spec.image_mean), checked_side(config.side, spec)
    parts = _records(data, test, format, image_root)
    _refuse_an_empty_test(parts[1], has_texts=side is not None or config.lit is not None)
    things = None if config.detect is None else ObjectClasses.of(parts[0].records, config.labels, stuff=False)
    parts = enough(parts[0], config.labels, config.train_regions), parts[1]
    known, asked = (PixelCache.build(part, pixels, cache_dir, fill=fill) for part in parts)
    names, labels = object_classes(known.records, config.labels)
    named = () if config.labels == "cluster" else names  # the number of a cluster is no text
    words = transcripts(known.records)
    every_word = transcripts([*known.records, *asked.records])
    vocabulary = words_of(known.records)

    rows: dict[str, dict[str, Share]] = {}
    for name, read in readers.items():
        train, held_out = (labelled_regions(read, part, labels) for part in (known, asked))
        texts = labelled_regions(read, known, text_labels(words))
        rows[name] = {
            "majority": majority(train, held_out),
            "knn": nearest_neighbours(train, held_out),
            "linear": linear(train, held_out),
            "reading_linear": linear(texts, labelled_regions(read, asked, text_labels(words))),
        }
        if tokens is not None and centres is not None and name == "own":
            read_texts = labelled_regions(read, asked, text_labels(every_word))
            rows[name]["reading_tokens"] = read_by_tokens(read_texts, every_word, centres, tokens)
        if side is not None and name in side.regions:
            rows[name] |= _against_texts(name, read, held_out, asked, named, side, config.templates)
            dense = dense_tower(model, name)
            if dense is not None:
                masked = mask_regions(dense, asked, labels)
                by_mask = zero_shot_classes(masked, named, side, name, config.templates)
                rows[name]["zero_shot_masks"] = by_mask
        if config.lit is not None and tokens is not None and vocabulary:
            worded = labelled_regions(read, known, word_labels(vocabulary))
            lit = lit_texts(worded, vocabulary, tokens, name, config.lit, model.device)
            rows[name] |= _as_lit(_against_texts(name, read, held_out, asked, named, lit))
    of_images = _of_images(model, asked, side, config.templates)
    if config.lit is not None and config.lit.images and tokens is not None:
        of_images |= _as_lit(_of_images(model, asked, lit_image_texts(model, known, tokens, config.lit), None))
    results = {
        "tower": str(tower),
        "labels": config.labels,
        "classes": len(names),
        "templates": len(config.templates or ()),
        "train_images": len(known),
        "test_images": len(asked),
        "shared_images": shared_images(*parts),
        "readouts": {name: json_rows(found) for name, found in rows.items()},
        "images": json_rows(of_images),
    }
    if not any([results["images"], *results["readouts"].values()]):
        raise UserError(
            f"nothing can be measured: no region of the {len(asked)} images of the test has a class ({config.labels}) "
            "or a transcript that the images to learn from have; give another --test or --labels."
        )
    if config.detect is not None and things is not None:
        results["detection"] = detection(model, known, asked, things, config.detect)
    if out is not None:
        _write(Path(out), results, model, asked)
    return results


def _tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    try:
        return open_tokenizer(path)
    except UserError as error:
        raise UserError(f"no tokenizer can be opened at '{path}'; give --tokenizer the folder of one.") from error


def _refuse_an_empty_test(asked: RecordSet, has_texts: bool) -> None:
    """Raises UserError where nothing in the test can be measured, before an image is read."""
    if any(record.regions for record in asked.records):
        return
    if not (has_texts and any(record.captions or record.tags for record in asked.records)):
        whole = ", captions or tags" if has_texts else ""
        raise UserError(f"{asked.path}: the records of the test have no regions{whole}: nothing can be measured.")


def _against_texts(
    readout: str,
    read: Reader,
    objects: ProbeRegions,
    cache: PixelCache,
    names: Sequence[str],
    side: RegionTexts,
    templates: Sequence[str] | None = None,
) -> dict[str, Share]:
    found = {"zero_shot": zero_shot_classes(objects, names, side, readout, templates)}
    return found | region_retrieval(read, cache, side, readout)


def _as_lit(found: dict[str, Share]) -> dict[str, Share]:
    return {f"lit_{figure}": value for figure, value in found.items()}


def _of_images(
    model: PreTrainedModel, cache: PixelCache, side: TextSide | None, templates: Sequence[str] | None
) -> dict[str, Share]:
    if side is None:
        return {}
    spec = describe_tower(model.config)
    found = image_retrieval(cache, side, spec, model.device)
    found |= image_classes(cache, side, spec, model.device, templates)
    return found if side.locate is None else found | {"text_box_acc50": located(cache, side, spec, model.device)}


def _records(data, test, format: str, image_root) -> tuple[RecordSet, RecordSet]:
    records = read_records(data, format, image_root)
    return (records, read_records(test, format, image_root)) if test is not None else split(records)


def split(records: RecordSet) -> tuple[RecordSet, RecordSet]:
    """Records to learn from and to be tested on: by their `split`, or those of every fifth image for the test where
    none has another split than "train". Raises UserError when one of the two is empty."""
    held_out = [record.split not in (None, "train") for record in records.records]
    if not any(held_out):
        number = {image: place for place, image in enumerate(dict.fromkeys(r.image for r in records.records))}
        held_out = [number[record.image] % 5 == 4 for record in records.records]
    if all(held_out) or not any(held_out):
        raise UserError(f"{records.path} cannot be split into records to learn from and to be tested on; give --test.")
    parts = [[r for r, out in zip(records.records, held_out, strict=True) if out == want] for want in (False, True)]
    known, asked = (RecordSet(records.path, records.root, part) for part in parts)
    return known, asked


def enough(records: RecordSet, source: ObjectLabels, objects: int) -> RecordSet:
    """Images that have about so many objects together, taken evenly from all of them, as a file may be sorted by class;
    all where there are no more objects."""
    labels = object_classes(records.records, source)[1]
    total = sum(label != NO_CLASS for record in records.records for label in labels(record))
    if total <= objects:
        return records
    rows = np.linspace(0, len(records) - 1, max(1, round(len(records) * objects / total))).round().astype(int)
    return replace(records, records=[records.records[row] for row in rows.tolist()])


def shared_images(known: RecordSet, asked: RecordSet) -> int:
    """How many images are in both."""
    images = [{(part.root, record.image) for record in part.records} for part in (known, asked)]
    return len(images[0] & images[1])


def _write(out: Path, results: dict[str, Any], model: PreTrainedModel, cache: PixelCache) -> None:
    out.mkdir(parents=True, exist_ok=True)
    rows = np.linspace(0, len(cache) - 1, min(PICTURES, len(cache))).round().astype(int).tolist()
    pca_sheet(model, cache, rows).save(out / "tokens.png")
    similarity_sheet(model, cache, rows).save(out / "similarity.png")
    (out / "probe.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def probe_table(results: dict[str, Any]) -> str:
    """The figures in lines, for reading."""
    by = f" by {results['templates']} templates" if results["templates"] else ""
    head = (
        f"{results['tower']}: {results['classes']} classes ({results['labels']}){by}, "
        f"{results['train_images']} images to learn from, {results['test_images']} to be tested on"
    )
    if results["shared_images"]:
        head += f"\nBEWARE: {results['shared_images']} images of the test are learned from, too"
    lines = [head, *figure_lines({**results["readouts"], "images": results["images"]})]
    return "\n".join([*lines, *([detection_line(results["detection"])] if "detection" in results else [])])
