"""Importers: other annotation formats -> region records, looked up by exact name.

An importer is a function `(path, image_root, **options)` that streams `(label, record or exception)`: the label names
the line or image for the run's summary, an exception (ValueError) stands in place of an item that is bad, and
`NothingToImport` in place of a sound one that no region record can hold (a text-only conversation).
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator

from ...vision_towers.errors import UserError
from ..records import Record
from .coco import import_coco
from .coco_panoptic import import_coco_panoptic
from .fields import NothingToImport
from .flickr30k import import_flickr30k
from .llava import import_llava
from .records import import_records
from .refcoco import import_refcoco
from .xywh_jsonl import import_xywh_jsonl

Importer = Callable[..., Iterator[tuple[str, Record | Exception]]]

_IMPORTERS: dict[str, Importer] = {}


def register_importer(name: str, importer: Importer) -> None:
    """Add an importer under an exact name. Raises ValueError when the name is taken."""
    if name in _IMPORTERS:
        raise ValueError(f"an importer named {name!r} is registered already")
    _IMPORTERS[name] = importer


def get_importer(name: str) -> Importer:
    """The importer of that exact name. Raises UserError naming the nearest one."""
    if name not in _IMPORTERS:
        near = difflib.get_close_matches(name, _IMPORTERS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(_IMPORTERS)}."
        raise UserError(f"There is no record format {name!r}; {hint}")
    return _IMPORTERS[name]


def importer_names() -> tuple[str, ...]:
    """All registered names."""
    return tuple(_IMPORTERS)


register_importer("records", import_records)
register_importer("xywh_jsonl", import_xywh_jsonl)
register_importer("coco", import_coco)
register_importer("coco_panoptic", import_coco_panoptic)
register_importer("llava", import_llava)
register_importer("refcoco", import_refcoco)
register_importer("flickr30k", import_flickr30k)

__all__ = [
    "Importer",
    "NothingToImport",
    "get_importer",
    "import_coco",
    "import_coco_panoptic",
    "import_flickr30k",
    "import_llava",
    "import_records",
    "import_refcoco",
    "import_xywh_jsonl",
    "importer_names",
    "register_importer",
]
