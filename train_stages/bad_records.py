"""What happens to bad records: each is skipped, counted and named; too many stop the run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..vision_towers.errors import UserError

_NAMED = 10
ENOUGH = 600  # records, before their share of bad ones says something about those that follow


@dataclass(frozen=True)
class BadRecord:
    """A record that was skipped: `line` names it in its file ("line 12", "image 9 (a.jpg)"), `reason` is a sentence."""

    line: str
    reason: str


def name_bad(bad: Sequence[BadRecord]) -> str:
    """The first ten bad records with their reasons, in one line."""
    named = "; ".join(f"{record.line}: {record.reason.rstrip('.')}" for record in bad[:_NAMED])
    rest = len(bad) - _NAMED
    return f"{named}; and {rest} more." if rest > 0 else f"{named}."


def refuse_too_many_bad(path: Path, bad: Sequence[BadRecord], total: int) -> None:
    """Raise UserError, naming the first ten, when more than max(5, 1 % of `total`) records are bad. `total` counts
    all records, the bad ones too."""
    if len(bad) > max(5, total / 100):
        raise UserError(
            f"{path}: {len(bad)} of {total} records are bad, more than max(5, 1 %); mend them: {name_bad(bad)}"
        )


def refuse_hopeless(path: Path, bad: Sequence[BadRecord], total: int) -> None:
    """Raise UserError before the end of a file where it would take an unlikely rest to come down to 1 %: more than a
    tenth of the first `ENOUGH` or more is bad. `total` counts the records so far, the bad ones too."""
    if total >= ENOUGH and len(bad) > total / 10:
        refuse_too_many_bad(path, bad, total)


def refuse_unusable(path: Path, bad: Sequence[BadRecord], good: int, passed_over: int = 0) -> None:
    """Raise UserError when too many records of a file are bad (`refuse_too_many_bad`), or none is good."""
    total = len(bad) + good + passed_over
    if total == 0:
        raise UserError(f"{path}: there is no record in it; give a file with at least one.")
    refuse_too_many_bad(path, bad, total)
    if good == 0:
        named = f"bad: {name_bad(bad)}" if bad else "none of them holds anything for a region record."
        raise UserError(f"{path}: none of its {total} records can be used; {named}")


def refuse_without_folder(image_root: Path) -> None:
    """Raise UserError when there is no folder `image_root`."""
    if not image_root.is_dir():
        raise UserError(
            f"{image_root}: there is no such folder; image_root must be the folder that image paths start from."
        )
