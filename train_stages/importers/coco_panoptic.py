"""Importer `coco_panoptic`: COCO panoptic JSON with its PNGs (Kirillov et al., arXiv 1801.00868; cocodataset.org).

Each annotation is an image's: a PNG in which a pixel of colour R, G, B belongs to the segment of id
R + 256 G + 256^2 B, 0 being void, and `segments_info` with the category of each id. The PNGs lie in the folder that has
the JSON's name without its ending, as COCO ships them, or in `segments_root`.

A segment becomes a region with its `category`, its mask, and the box of its mask (COCO's own `bbox` and `area` are not
read: they follow from the pixels). A category that is no thing (`isthing` 0) gives `stuff`, and so does a crowd
(`iscrowd`), whose category is a thing's. An image without an annotation, as in the test set, is a record without
regions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ...vision_towers.errors import UserError
from ..masks import encode_mask
from ..records import Mask, Record, Region
from .fields import json_document, need, one_sentence, want

Categories = Mapping[int, tuple[str, bool]]  # id -> name, whether it is a thing


def import_coco_panoptic(
    path: Path, image_root: Path, segments_root: str | Path | None = None
) -> Iterator[tuple[str, Record | Exception]]:
    """Stream ("image ID (FILE)", record) in the order of `images`, with the error in place of a record that is not
    valid. A PNG is read when its record is asked for. Raises UserError when the file is not of this layout.
    """
    folder = path.with_suffix("") if segments_root is None else Path(segments_root)
    document = _document(path)
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder; it should hold the PNGs of {path.name}.")
    categories: dict[int, tuple[str, bool]] = {}
    for category in document["categories"]:
        try:
            thing = bool(need(category, "isthing", int))
            categories[need(category, "id", int)] = (need(category, "name", str), thing)
        except (TypeError, ValueError) as error:
            raise UserError(f"{path}: a category of it is not COCO's panoptic layout: {error}.") from None
    annotations: dict[Any, Any] = {}
    for position, annotation in enumerate(document["annotations"]):
        label = f"annotation number {position}"
        if not isinstance(annotation, dict) or not isinstance(annotation.get("image_id"), int | str):
            yield label, ValueError("has no 'image_id'")
        elif annotation["image_id"] in annotations:
            yield label, ValueError(f"its image {annotation['image_id']!r} has another annotation already")
        else:
            annotations[annotation["image_id"]] = annotation
    seen: set[int | str] = set()
    for position, image in enumerate(document["images"]):
        label = f"image number {position}"
        try:
            if not isinstance(image, dict):
                raise ValueError("is not an object")
            identity = need(image, "id", (int, str))
            label = f"image {identity} ({image.get('file_name')})"
            if identity in seen:
                raise ValueError(f"the image id {identity!r} occurs twice")
            seen.add(identity)
            record = _record(image, annotations.get(identity), categories, folder)
        except ValueError as error:
            yield label, error
        else:
            yield label, record
    for identity in annotations.keys() - seen:
        yield f"annotation of image {identity}", ValueError("its image is not among the images")


def segment_ids(png: Path) -> np.ndarray:
    """`(height, width)` int64 of a panoptic PNG: R + 256 G + 256^2 B. Raises ValueError when it cannot be read, or is
    no RGB."""
    try:
        with Image.open(png, formats=("PNG",)) as image:
            if image.mode not in ("RGB", "RGBA"):  # a palette or gray holds no such ids
                raise ValueError(f"{png.name} is a PNG of mode {image.mode}, and ids are written as RGB")
            colours = np.asarray(image)[..., :3].astype(np.int64)
    except (OSError, SyntaxError) as error:  # Pillow raises SyntaxError for a broken PNG
        raise ValueError(f"{png}: cannot be read ({error})") from None
    return colours @ np.array([1, 256, 256**2])


def _document(path: Path) -> dict[str, Any]:
    document = json_document(path)
    lists = ("images", "annotations", "categories")
    if not isinstance(document, dict) or not all(isinstance(document.get(key), list) for key in lists):
        raise UserError(f"{path}: is not COCO's layout; it needs lists of 'images', 'annotations' and 'categories'.")
    return document


def _record(
    image: Mapping[str, Any], annotation: Mapping[str, Any] | None, categories: Categories, folder: Path
) -> Record:
    width, height = need(image, "width", int), need(image, "height", int)
    regions: list[Region] = []
    if annotation is not None:
        ids = segment_ids(folder / need(annotation, "file_name", str))
        if ids.shape != (height, width):
            raise ValueError(f"its segments are {ids.shape[1]} x {ids.shape[0]} px, and the image {width} x {height}")
        segments = need(annotation, "segments_info", list)
        for segment in segments:
            try:
                if not isinstance(segment, dict):
                    raise ValueError("is not an object")
                regions.append(_region(segment, ids, categories))
            except ValueError as error:
                name = segment.get("id") if isinstance(segment, dict) else segment
                raise ValueError(f"segment {name}: {one_sentence(error)}") from None
        listed = {segment["id"] for segment in segments}
        if len(listed) < len(segments):
            raise ValueError("two of its segments have the same id")
        unknown = set(np.unique(ids).tolist()) - listed - {0}
        if unknown:
            raise ValueError(f"its PNG has a segment {min(unknown)} that 'segments_info' does not name")
    return Record(image=need(image, "file_name", str), width=width, height=height, regions=regions)


def _region(segment: Mapping[str, Any], ids: np.ndarray, categories: Categories) -> Region:
    identity, category = need(segment, "id", int), need(segment, "category_id", int)
    if category not in categories:
        raise ValueError(f"its category {category!r} is not among the categories")
    if identity == 0:
        raise ValueError("the id 0 is that of void")
    name, thing = categories[category]
    mask = ids == identity
    if not mask.any():
        raise ValueError("has no pixel in the PNG")
    rows, columns = (np.flatnonzero(mask.any(axis=axis)).tolist() for axis in (1, 0))
    return Region(
        box_xyxy=(columns[0], rows[0], columns[-1] + 1, rows[-1] + 1),
        category=name,
        stuff=not thing or bool(want(segment, "iscrowd", int, 0)),
        mask=Mask(**encode_mask(mask)),
    )
