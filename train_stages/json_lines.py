"""A JSONL file whose lines are read when they are asked for."""

from __future__ import annotations

from array import array
from pathlib import Path

from ..vision_towers.errors import UserError


class JsonLines:
    """The lines of a file that are not blank, by number. Only where each begins is held in memory (8 bytes a line).

    Raises:
        UserError: the file cannot be read, or has no line.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._starts = array("q")
        try:
            with path.open("rb") as file:
                place = 0
                for line in file:
                    if line.strip():
                        self._starts.append(place)
                    place += len(line)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}); check the path.") from None
        if not self._starts:
            raise UserError(f"{path}: there is no record in it; give a file with at least one.")

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> bytes:
        with self.path.open("rb") as file:
            file.seek(self._starts[index])
            return file.readline().removeprefix(b"\xef\xbb\xbf")  # a byte order mark
