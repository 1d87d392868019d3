"""Importer `coco`: COCO instances or captions JSON, or both together.

`import_coco(instances, image_root)` gives regions, `import_coco(captions, image_root)` image captions, and
`import_coco(instances, image_root, captions_path=captions)` both; captions of images that are not in the first file
are left out. An image without annotations is a record without regions.

Crowd annotations (`iscrowd`: one box over many objects) are never one object, and COCO's evaluation ignores what falls
into them. They are kept as `stuff`, without a phrase: dropped altogether, "the only person" would look true beside a
crowd of people.

LVIS v1 is of this layout; its images have a `coco_url` and no `file_name`, and lie in folders of COCO's splits, such as
`val2017/000000397133.jpg`.

An instance gets its `category` and mask, and no `texts`: a class name alone does not single out a region.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ...vision_towers.errors import UserError
from ..records import Mask, Record, Region
from .fields import json_document, need, one_sentence, segmentation_to_mask, want, xywh_to_xyxy


@dataclass
class _Annotations:
    """What the files say about one image."""

    objects: list[Mapping[str, Any]] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)
    fault: ValueError | None = None


def import_coco(
    path: Path, image_root: Path, captions_path: str | Path | None = None
) -> Iterator[tuple[str, Record | Exception]]:
    """Stream ("image ID (FILE)", record) in the order of `images`, with the error in place of a record that is not
    valid. The JSON is read whole (COCO's largest needs about 3 GB). Raises UserError when a file is not COCO's layout.
    """
    document = _document(path)
    categories = {}
    for category in document["categories"]:
        if isinstance(category, dict) and isinstance(category.get("id"), int | str):
            categories[category["id"]] = category.get("name")
    by_image: dict[int | str, _Annotations] = {}
    for image in document["images"]:
        if isinstance(image, dict) and isinstance(image.get("id"), int | str):
            by_image.setdefault(image["id"], _Annotations())
    yield from _collect(document, by_image, may_be_elsewhere=False)
    if captions_path is not None:
        yield from _collect(_document(Path(captions_path)), by_image, may_be_elsewhere=True)

    seen: set[int | str] = set()
    for position, image in enumerate(document["images"]):
        label = f"image number {position}"
        try:
            if not isinstance(image, dict):
                raise ValueError("is not an object")
            identity = need(image, "id", (int, str))
            label = f"image {identity} ({image.get('file_name', image.get('coco_url'))})"
            if identity in seen:
                raise ValueError(f"the image id {identity!r} occurs twice")
            seen.add(identity)
            record = _record(image, by_image[identity], categories)
        except ValueError as error:
            yield label, error
        else:
            yield label, record


def _document(path: Path) -> dict[str, Any]:
    document = json_document(path)
    if isinstance(document, dict):
        document.setdefault("categories", [])  # a captions file has none
    for key in ("images", "annotations", "categories"):
        if not isinstance(document, dict) or not isinstance(document.get(key), list):
            raise UserError(
                f"{path}: is not COCO's layout; it needs lists of 'images', 'annotations' and 'categories'."
            )
    return document


def _collect(
    document: Mapping[str, Any], by_image: Mapping[int | str, _Annotations], may_be_elsewhere: bool
) -> Iterator[tuple[str, Exception]]:
    """Sort annotations to their images; yield those that belong to none."""
    for position, annotation in enumerate(document["annotations"]):
        label = f"annotation number {position}"
        try:
            if not isinstance(annotation, dict):
                raise ValueError("is not an object")
            label = f"annotation {annotation.get('id', f'number {position}')}"
            image = by_image.get(need(annotation, "image_id", (int, str)))
        except ValueError as error:
            yield label, error
            continue
        if image is None:
            if not may_be_elsewhere:
                yield label, ValueError(f"its image {annotation['image_id']!r} is not among the images")
        elif isinstance(annotation.get("caption"), str):
            image.captions.append(annotation["caption"])
        elif "bbox" in annotation:
            image.objects.append(annotation)
        else:
            image.fault = ValueError(f"{label} has neither a 'bbox' nor a 'caption'")


def _record(image: Mapping[str, Any], annotations: _Annotations, categories: Mapping[int | str, Any]) -> Record:
    if annotations.fault is not None:
        raise annotations.fault
    width, height = need(image, "width", int), need(image, "height", int)
    regions = []
    for annotation in annotations.objects:
        try:
            regions.append(_region(annotation, categories, width, height))
        except ValueError as error:
            raise ValueError(f"annotation {annotation.get('id')}: {one_sentence(error)}") from None
    return Record(
        image=_file(image),
        width=width,
        height=height,
        captions=[text for caption in annotations.captions if (text := caption.strip())],
        regions=regions,
    )


def _file(image: Mapping[str, Any]) -> str:
    """LVIS v1 names its images by their address at COCO's: `http://.../val2017/000000397133.jpg`."""
    if "file_name" not in image and image.get("coco_url") is not None:
        return "/".join(urlsplit(need(image, "coco_url", str)).path.split("/")[-2:])
    return need(image, "file_name", str)


def _region(annotation: Mapping[str, Any], categories: Mapping[int | str, Any], width: int, height: int) -> Region:
    category = need(annotation, "category_id", (int, str))
    if category not in categories:
        raise ValueError(f"its category {category!r} is not among the categories")
    mask = segmentation_to_mask(annotation.get("segmentation"), width, height)
    return Region(
        box_xyxy=xywh_to_xyxy(need(annotation, "bbox", list)),
        category=categories[category],
        stuff=bool(want(annotation, "iscrowd", (int, bool), 0)),
        mask=None if mask is None else Mask(**mask),
    )
