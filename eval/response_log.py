"""An append-only log of answers: what a killed run has asked already is not asked again.

lmms-eval's own cache writes only after every answer of every task is in, and its key knows neither the image nor the
weights.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from ..vision_towers.errors import UserError


def answer_key(*parts: object) -> str:
    """SHA-256 over the JSON of everything that an answer depends on."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


class ResponseLog:
    """The answers in `path` (JSONL, one `{"key", ...}` object a line), and those that the ranks of it wrote.

    Rank 0 appends to `path` itself, rank r to `<stem>.rank<r><suffix>` beside it; all of them are read at the start, so
    a run may be resumed on another number of processes. A last line that a kill cut short is ignored.

    Raises:
        UserError: `path` is a folder, or a line before the last is not an object with a key.
    """

    def __init__(self, path: str | Path, rank: int = 0) -> None:
        base = Path(path)
        if base.is_dir():
            raise UserError(f"the response log {base} is a folder; name a .jsonl file in it")
        base.parent.mkdir(parents=True, exist_ok=True)
        self.path = base if rank == 0 else _rank_file(base, str(rank))
        self.answers: dict[str, dict] = {}
        for file in log_files(base):
            self.answers.update(_read(file))
        _end_with_newline(self.path)

    def add(self, entries: Mapping[str, dict]) -> None:
        """Append one line for each key and flush: after the return they survive a kill of the process."""
        with self.path.open("a", encoding="utf-8") as file:
            for key, entry in entries.items():
                file.write(json.dumps({"key": key, **entry}, ensure_ascii=False) + "\n")
        self.answers.update(entries)


def log_files(path: str | Path) -> list[Path]:
    """The existing files of the log at `path`: its own and those of its ranks."""
    base = Path(path)
    # Not `glob`: a folder or stem may hold its special characters.
    ranks = sorted(file for file in base.parent.iterdir() if _is_rank_file(file, base)) if base.parent.is_dir() else []
    return [base, *ranks] if base.is_file() else ranks


def _rank_file(base: Path, rank: str) -> Path:
    return base.with_name(f"{base.stem}.rank{rank}{base.suffix}")


def _is_rank_file(file: Path, base: Path) -> bool:
    rank = file.name.removeprefix(f"{base.stem}.rank").removesuffix(base.suffix)
    return rank.isdigit() and file == _rank_file(base, rank)


def _read(file: Path) -> dict[str, dict]:
    answers: dict[str, dict] = {}
    lines = file.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError:
            entry = None
        if isinstance(entry, dict) and "key" in entry:
            answers[entry.pop("key")] = entry
        elif number < len(lines):  # only the last line can be half a line
            raise UserError(f"{file} line {number} is not an answer of this log; delete the line or the file")
    return answers


def _end_with_newline(file: Path) -> None:
    """Cut the half line of a killed writer off, so that the next answer starts a line of its own."""
    if not file.is_file():
        return
    content = file.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole != len(content):
        with file.open("r+b") as handle:
            handle.truncate(whole)
