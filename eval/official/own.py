"""Region records of one's own under a data root: every `ROOT/NAME/val.jsonl` is a source called NAME."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ...train_stages.importers.fields import json_lines
from ...vision_towers.errors import UserError

FILE_NAME = "val.jsonl"


@dataclass(frozen=True)
class OwnRecords:
    """name: of the folder. path: of the records. format: "records" or "xywh_jsonl", told by the file's regions.
    image_root: the file's own folder, or the data root where the first image lies there."""

    name: str
    path: Path
    format: str
    image_root: Path


def own_records(root: Path) -> list[OwnRecords]:
    """All of them, by name. Raises UserError when one has no line that is a record with regions."""
    return [_described(root, path) for path in sorted(root.glob(f"*/{FILE_NAME}"))]


def _described(root: Path, path: Path) -> OwnRecords:
    for _, item in json_lines(path):
        if not isinstance(item, Mapping) or not isinstance(item.get("image"), str):
            continue
        regions = item.get("regions")
        if isinstance(regions, list) and regions and isinstance(regions[0], Mapping):
            beside = (path.parent / item["image"]).is_file()
            name = "xywh_jsonl" if "bbox" in regions[0] else "records"
            return OwnRecords(path.parent.name, path, name, path.parent if beside else root)
    raise UserError(f"{path}: none of its lines is a region record with an image and regions; see docs/records.md.")
