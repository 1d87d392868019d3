"""Importer `records`: our own JSONL, one record a line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ..records import Record
from .fields import raw_lines


def import_records(path: Path, image_root: Path) -> Iterator[tuple[str, Record | Exception]]:
    """Stream ("line N", record), with the error in place of a record that is not valid."""
    for label, line in raw_lines(path):
        try:
            record = Record.model_validate_json(line)
        except ValueError as error:
            yield label, error
        else:
            yield label, record
