"""`log.jsonl`, one line for each logged step, and `eval.jsonl`, one for each measurement on held-out data."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TypeVar

from ..atomic_write import write_atomically

LOG_FILE = "log.jsonl"
EVAL_FILE = "eval.jsonl"


@dataclass(frozen=True)
class LogRow:
    """Means over the steps since the row before.

    Attributes:
        step: optimizer steps done.
        loss: mean training loss.
        lr: part -> learning rate of the last step.
        seconds: training time so far, earlier runs of the same directory included.
        samples: samples seen so far by all processes.
        grad_norm: norm of the gradients of the last step, before clipping.
        metrics: means of what the model returned as `metrics`.
        throughput: see `Throughput.take`.
    """

    step: int
    loss: float
    lr: dict[str, float]
    seconds: float
    samples: int
    grad_norm: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    throughput: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class EvalRow:
    """What was measured on held-out data after `step` optimizer steps and `seconds` of training."""

    step: int
    seconds: float
    figures: dict[str, float]


Row = TypeVar("Row", LogRow, EvalRow)


def append_row(path: Path, row: LogRow | EvalRow) -> None:
    """One write call per line, so that a crash leaves at most one broken last line."""
    with path.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(asdict(row)) + "\n")


def read_rows(path: Path, kind: type[Row]) -> list[Row]:
    """All rows; a line that a crash left unfinished is not one."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            rows.append(kind(**json.loads(line)))
        except (json.JSONDecodeError, TypeError):
            continue
    return rows


def keep_rows_until(path: Path, step: int, kind: type[Row]) -> list[Row]:
    """Drop the rows after `step`, as the resumed run takes these steps again; the rows that are left."""
    rows = [row for row in read_rows(path, kind) if row.step <= step]
    if rows or path.is_file():
        write_atomically(path, "".join(json.dumps(asdict(row)) + "\n" for row in rows))
    return rows


def tail_means(rows: Sequence[LogRow]) -> tuple[float | None, dict[str, float]]:
    """Loss and metrics averaged over the last tenth of the rows: one row alone is noise."""
    if not rows:
        return None, {}
    tail = rows[-max(1, len(rows) // 10) :]
    names = dict.fromkeys(name for row in tail for name in row.metrics)
    metrics = {}
    for name in names:
        values = [row.metrics[name] for row in tail if name in row.metrics]
        metrics[name] = sum(values) / len(values)
    return sum(row.loss for row in tail) / len(tail), metrics
