"""Importer `flickr30k`: Flickr30k Entities (Plummer et al. 2015, arXiv 1505.04870),
https://github.com/BryanPlummer/flickr30k_entities

    FOLDER/test.txt              image ids, one a line; also val.txt and train.txt
    FOLDER/Sentences/ID.txt      five captions: "[/EN#1/people A man] in [/EN#2/clothing a red hat] ."
    FOLDER/Annotations/ID.xml    image size, and the boxes of each entity

The importer's path is the list of ids of a split. An entity's boxes are merged into the smallest box around them all
(the "merged boxes" protocol); `boxes` of a `Phrase` keeps them apart. Phrases about the whole scene, or about what
cannot be seen, have no box and are left out.
"""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...vision_towers.errors import UserError
from ..records import Record, Region
from .fields import distinct, one_sentence

PAGE = "https://github.com/BryanPlummer/flickr30k_entities"
_NO_ENTITY = "0"  # phrases that were not linked to anything

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Phrase:
    """A phrase of a caption whose entity has boxes. kinds: people, clothing, bodyparts, animals, vehicles,
    instruments, scene, other."""

    image_id: str
    width: int
    height: int
    sentence: str
    phrase: str
    entity: str
    kinds: tuple[str, ...]
    boxes: tuple[Box, ...]

    @property
    def merged_box(self) -> Box:
        """The smallest box around all of the entity's boxes."""
        lefts, tops, rights, bottoms = zip(*self.boxes, strict=True)
        return min(lefts), min(tops), max(rights), max(bottoms)


def read_image_ids(split_path: Path) -> list[str]:
    """The image ids of a split. Raises UserError when the list is missing or empty."""
    try:
        ids = split_path.read_text(encoding="utf-8").split()
    except OSError:
        raise UserError(f"{split_path}: there is no such list of images; get it from {PAGE}.") from None
    if not ids:
        raise UserError(f"{split_path}: is empty; get it from {PAGE}.")
    return ids


def read_phrases(folder: Path, image_id: str) -> list[Phrase]:
    """The phrases with boxes of all captions of one image, in order; a phrase that two captions have comes twice.

    Raises UserError when a file of the image is missing or damaged.
    """
    width, height, boxes = _annotations(folder / "Annotations" / f"{image_id}.xml")
    lines = _lines(folder, image_id)
    found = []
    for line in lines:
        sentence, marked = _marked(line)
        for phrase, entity, kinds in marked:
            if entity in boxes:
                found.append(Phrase(image_id, width, height, sentence, phrase, entity, kinds, tuple(boxes[entity])))
    return found


def _lines(folder: Path, image_id: str) -> list[str]:
    """The captions of one image, with their marks."""
    path = folder / "Sentences" / f"{image_id}.txt"
    try:
        return list(filter(str.strip, path.read_text(encoding="utf-8").splitlines()))
    except (OSError, UnicodeDecodeError):
        raise UserError(f"{path}: the captions of image {image_id} cannot be read; get them from {PAGE}.") from None


def import_flickr30k(path: Path, image_root: Path) -> Iterator[tuple[str, Record | Exception]]:
    """Stream ("image ID", record) for the ids of a split (`path`, beside `Sentences/` and `Annotations/`): each
    entity is a region with its phrases as `texts`, the sentences, with a boxed phrase or without, are the image's
    `captions`. Images are `ID.jpg` under `image_root`."""
    for image_id in read_image_ids(path):
        label = f"image {image_id}"
        try:
            record = _record(read_phrases(path.parent, image_id), image_id, path)
        except (UserError, ValueError) as error:
            yield label, ValueError(one_sentence(error))
        else:
            yield label, record


def _record(phrases: Sequence[Phrase], image_id: str, path: Path) -> Record:
    width, height, _ = _annotations(path.parent / "Annotations" / f"{image_id}.xml")
    entities: dict[str, list[Phrase]] = {}
    for phrase in phrases:
        entities.setdefault(phrase.entity, []).append(phrase)
    regions = [
        Region(
            box_xyxy=said[0].merged_box,
            stuff=len(said[0].boxes) > 1,  # one box around several things
            texts=distinct([phrase.phrase for phrase in said]),
            tags=list(dict.fromkeys(kind for phrase in said for kind in phrase.kinds)),
        )
        for said in entities.values()
    ]
    captions = [_marked(line)[0] for line in _lines(path.parent, image_id)]
    return Record(
        image=f"{image_id}.jpg", width=width, height=height, split=path.stem, captions=captions, regions=regions
    )


def _annotations(path: Path) -> tuple[int, int, dict[str, list[Box]]]:
    """Width, height, and entity -> its boxes. Corners of the files are 1-based whole pixels (VOC); all published
    figures take them as they are, and so do we."""
    try:
        root = ElementTree.parse(path).getroot()
        size = root.find("size")
        width, height = (int(_text(size, name)) for name in ("width", "height"))
        boxes: dict[str, list[Box]] = {}
        for item in root.iter("object"):
            corners = item.find("bndbox")
            if corners is None:
                continue
            x0, y0, x1, y1 = (float(_text(corners, name)) for name in ("xmin", "ymin", "xmax", "ymax"))
            for name in item.findall("name"):
                boxes.setdefault(name.text or "", []).append((x0, y0, x1, y1))
    except (OSError, ElementTree.ParseError, ValueError) as error:
        raise UserError(f"{path}: the boxes of this image cannot be read ({error}); get them from {PAGE}.") from None
    return width, height, boxes


def _text(element: ElementTree.Element | None, name: str) -> str:
    found = None if element is None else element.findtext(name)
    if found is None:
        raise ValueError(f"<{name}> is missing")
    return found


def _marked(line: str) -> tuple[str, list[tuple[str, str, tuple[str, ...]]]]:
    """A caption without its marks, and (phrase, entity, kinds) of each mark."""
    words: list[str] = []
    found: list[tuple[str, str, tuple[str, ...]]] = []
    entity, kinds, inside = "", (), list[str]()
    is_open = False
    for token in line.split():
        if not is_open and token.startswith("[/EN#"):
            entity, *rest = token.removeprefix("[/EN#").split("/")
            kinds, inside, is_open = tuple(rest), [], True
            continue
        closes = is_open and token.endswith("]")
        word = token[:-1] if closes else token
        words.append(word)
        if is_open:
            inside.append(word)
        if closes:
            is_open = False
            if entity != _NO_ENTITY:
                found.append((" ".join(inside), entity, kinds))
    return " ".join(words), found
