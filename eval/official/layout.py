"""Where official files lie under a data root, and who gives them out.

ROOT/refcoco/refs(unc).p      ROOT/refcoco/instances.json
ROOT/refcoco+/refs(unc).p     ROOT/refcoco+/instances.json
ROOT/refcocog/refs(umd).p     ROOT/refcocog/instances.json
ROOT/train2014/COCO_train2014_*.jpg             images of the three
ROOT/flickr30k/{val,test}.txt, Sentences/, Annotations/      ROOT/flickr30k/images/ID.jpg
ROOT/reflvis/lvis_eval.jsonl                    ROOT/val2017/*.jpg
ROOT/ferret_bench/rule.json, {refer_caption,refer_reason,ground_conv}/{question,answer,context}.jsonl, and val2017/
ROOT/NAME/val.jsonl           region records of your own (see `own`)
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from ...vision_towers.errors import UserError
from ..task_rows import TaskRow

DATA_ROOT_VARIABLE = "REGIONTOWER_DATA"

REFER_PAGE = "https://github.com/lichengunc/refer"
FLICKR_PAGE = "https://github.com/BryanPlummer/flickr30k_entities"
FLICKR_IMAGES_PAGE = "https://shannon.cs.illinois.edu/DenotationGraph/"
COCO_PAGE = "https://cocodataset.org/#download"
FERRET_PAGE = "https://github.com/apple/ml-ferret"


class Absent(UserError):
    """A benchmark's folder is not under the data root at all: it was not asked for. Part of it missing is a
    UserError."""


def data_root(given: str | Path | None) -> Path | None:
    """The folder that was given, else that of `REGIONTOWER_DATA`, else None. A UserError when there is no such
    folder."""
    value = given if given is not None else os.environ.get(DATA_ROOT_VARIABLE) or None
    if value is None:
        return None
    root = Path(value)
    if not root.is_dir():
        raise UserError(f"{root}: there is no such folder for --data-root (or {DATA_ROOT_VARIABLE}).")
    return root


def need_folder(folder: Path, page: str) -> Path:
    """The folder, or `Absent` naming the page that has it."""
    if not folder.is_dir():
        raise Absent(f"{folder}: there is no such folder; its files are at {page}.")
    return folder


def need_file(path: Path, page: str) -> Path:
    """The file, or a UserError naming the page that has it."""
    if not path.is_file():
        raise UserError(f"{path}: there is no such file; get it from {page}.")
    return path


def need_images(rows: Iterable[TaskRow], page: str) -> None:
    """A UserError that names the first missing image, how many miss, and the page that has them."""
    missing = [path for path in dict.fromkeys(row.image for row in rows) if not Path(path).is_file()]
    if missing:
        raise UserError(f"{missing[0]}: there is no such image ({len(missing)} are missing); get them from {page}.")
