"""Importer `refcoco`: RefCOCO, RefCOCO+ and RefCOCOg, from `refs(*).p` with COCO's `instances.json` beside it.

    refs(unc).p   a list of {"ref_id", "ann_id", "image_id", "split", "sentences": [{"sent", "raw", "tokens", ...}]}
    instances.json   COCO's layout: images, annotations, categories

Yu et al. 2016 (arXiv 1608.00272) and Mao et al. 2016 (arXiv 1511.02283); the files are those of
https://github.com/lichengunc/refer. What a referring expression says is its `sent` (lower case, without punctuation at
the ends), as all published figures take it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...vision_towers.errors import UserError
from ..records import Mask, Record, Region
from .fields import distinct, json_document, need, one_sentence, segmentation_to_mask, want, xywh_to_xyxy
from .plain_pickle import load_plain_pickle

PAGE = "https://github.com/lichengunc/refer"
INSTANCES_NAME = "instances.json"


@dataclass(frozen=True)
class RefExpression:
    """One sentence about one object. `others`: how many further objects of its category the image holds."""

    image: str
    image_id: int
    width: int
    height: int
    split: str
    ref_id: int
    ann_id: int
    sentence: str
    box_xyxy: tuple[float, float, float, float]
    category: str
    others: int


@dataclass(frozen=True)
class _Coco:
    images: dict[int, Mapping[str, Any]]
    annotations: dict[int, Mapping[str, Any]]
    categories: dict[int, str]

    @classmethod
    def read(cls, path: Path) -> _Coco:
        if not path.is_file():
            raise UserError(f"{path}: there is no such file; it comes with the refs(*).p beside it, see {PAGE}.")
        document = json_document(path)
        try:
            images, annotations, categories = (
                {need(item, "id", int): item for item in need(document, key, list)}
                for key in ("images", "annotations", "categories")
            )
        except (ValueError, TypeError) as error:
            raise UserError(f"{path}: is not COCO's layout ({error}).") from None
        return cls(images, annotations, {key: str(item.get("name", "")) for key, item in categories.items()})


def read_expressions(refs_path: Path, split: str | None = None) -> list[RefExpression]:
    """Every sentence of every ref of `split` (None for all), in the order of the file, one entry a sentence.

    Raises:
        UserError: a file is missing or damaged, holds more than plain values, or the two do not belong together.
    """
    coco, refs = _Coco.read(refs_path.parent / INSTANCES_NAME), _refs(refs_path)
    per_category: dict[tuple[int, int], int] = {}
    for annotation in coco.annotations.values():
        key = (annotation.get("image_id", -1), annotation.get("category_id", -1))
        per_category[key] = per_category.get(key, 0) + 1
    found: list[RefExpression] = []
    for position, ref in enumerate(refs):
        try:
            if split is None or ref["split"] == split:
                found += _expressions(ref, coco, per_category)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{refs_path}: ref number {position} cannot be used ({_reason(error)}).") from None
    return found


def import_refcoco(path: Path, image_root: Path, split: str | None = None) -> Iterator[tuple[str, Record | Exception]]:
    """Stream ("image ID (FILE)", record): all objects of each image that a ref of `split` (None: any) is about, with
    category, mask and, as `texts`, the sentences about them. A crowd is `stuff`."""
    coco, refs = _Coco.read(path.parent / INSTANCES_NAME), _refs(path)
    sentences: dict[int, list[str]] = {}
    splits: dict[int, str] = {}
    for position, ref in enumerate(refs):
        try:
            if split is not None and ref["split"] != split:
                continue
            sentences.setdefault(need(ref, "ann_id", int), []).extend(_sentences(ref))
            splits.setdefault(need(ref, "image_id", int), str(ref["split"]))
        except (ValueError, KeyError, TypeError) as error:
            yield f"ref number {position}", ValueError(_reason(error))
    objects: dict[int, list[Mapping[str, Any]]] = {}
    for annotation in coco.annotations.values():
        if annotation.get("image_id") in splits:
            objects.setdefault(annotation["image_id"], []).append(annotation)
    for image_id, image_split in splits.items():
        label = f"image {image_id}"
        try:
            image = coco.images[image_id]
            label = f"image {image_id} ({image.get('file_name')})"
            record = _record(image, objects.get(image_id, []), coco, sentences, image_split)
        except KeyError:
            yield label, ValueError(f"image {image_id} is not in {INSTANCES_NAME}")
        except (ValueError, TypeError) as error:
            yield label, ValueError(one_sentence(error))
        else:
            yield label, record


def _refs(path: Path) -> list[Mapping[str, Any]]:
    if not path.is_file():
        raise UserError(f"{path}: there is no such file; get it from {PAGE}.")
    refs = load_plain_pickle(path)
    if not isinstance(refs, list) or not all(isinstance(ref, dict) for ref in refs):
        raise UserError(f"{path}: is not a list of refs; get it from {PAGE}.")
    return refs


def _expressions(
    ref: Mapping[str, Any], coco: _Coco, per_category: Mapping[tuple[int, int], int]
) -> Iterator[RefExpression]:
    annotation = coco.annotations[need(ref, "ann_id", int)]
    image = coco.images[need(ref, "image_id", int)]
    if annotation.get("image_id") != ref["image_id"]:
        raise ValueError(f"annotation {ref['ann_id']} lies in another image")
    category = need(annotation, "category_id", int)
    for sentence in _sentences(ref):
        yield RefExpression(
            image=need(image, "file_name", str),
            image_id=ref["image_id"],
            width=need(image, "width", int),
            height=need(image, "height", int),
            split=ref["split"],
            ref_id=need(ref, "ref_id", int),
            ann_id=ref["ann_id"],
            sentence=sentence,
            box_xyxy=xywh_to_xyxy(need(annotation, "bbox", list)),
            category=coco.categories.get(category, ""),
            others=per_category[ref["image_id"], category] - 1,
        )


def _sentences(ref: Mapping[str, Any]) -> list[str]:
    return [need(sentence, "sent", str) for sentence in need(ref, "sentences", list)]


def _record(
    image: Mapping[str, Any],
    annotations: Sequence[Mapping[str, Any]],
    coco: _Coco,
    sentences: Mapping[int, list[str]],
    split: str,
) -> Record:
    width, height = need(image, "width", int), need(image, "height", int)
    regions = []
    for annotation in annotations:
        mask = segmentation_to_mask(annotation.get("segmentation"), width, height)
        regions.append(
            Region(
                box_xyxy=xywh_to_xyxy(need(annotation, "bbox", list)),
                category=coco.categories.get(annotation.get("category_id", -1)) or None,
                stuff=bool(want(annotation, "iscrowd", (int, bool), 0)),
                texts=distinct(sentences.get(annotation["id"], [])),
                mask=None if mask is None else Mask(**mask),
            )
        )
    return Record(image=need(image, "file_name", str), width=width, height=height, split=split, regions=regions)


def _reason(error: Exception) -> str:
    return f"{error} is missing" if isinstance(error, KeyError) else one_sentence(error)
