"""The part of a recipe's `data` block that says which region records to read."""

from __future__ import annotations

from pathlib import Path

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from ..vision_towers.errors import UserError
from .record_io import RecordSet, merge_record_sets, read_records

WEBDATASET = "webdataset"  # the format


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class RecordSource:
    """Which records.

    records: one file of region records or several. root: folder that `records` and the images in them are relative
    to; without it `records` are relative to the working directory and images to their records file. format: an
    importer's name, or "webdataset", whose shards can only be streamed. check_images: decode every image before
    training starts.
    """

    records: str | tuple[str, ...]
    root: str | None = None
    format: str = "records"
    check_images: bool = False

    def names(self) -> tuple[str, ...]:
        """The files as the recipe names them."""
        return (self.records,) if isinstance(self.records, str) else self.records

    def paths(self) -> list[Path]:
        """The files, with `root` in front."""
        return [Path(self.root, name) if self.root else Path(name) for name in self.names()]

    def addresses(self) -> list[str]:
        """The same as text; what has a scheme ("https://...", "s3://...") stays as it is."""
        return [name if "://" in name else str(path) for name, path in zip(self.names(), self.paths(), strict=True)]

    def read(self) -> RecordSet:
        """All of them as one record set.

        Raises:
            UserError: a file that cannot be read, or too many bad records in it.
        """
        if self.format == WEBDATASET:
            raise UserError("Images in webdataset shards have no files of their own; stream them: data.stream=true.")
        return merge_record_sets(
            [read_records(path, self.format, self.root, self.check_images) for path in self.paths()]
        )
