"""`log.jsonl`: one line for each logged step."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from .manifest import write_atomically

LOG_FILE = "log.jsonl"


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
    """

    step: int
    loss: float
    lr: dict[str, float]
    seconds: float
    samples: int
    grad_norm: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)


def append_row(run_dir: Path, row: LogRow) -> None:
    """One write call per line, so that a crash leaves at most one broken last line."""
    with (run_dir / LOG_FILE).open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(asdict(row)) + "\n")


def read_rows(run_dir: Path) -> list[LogRow]:
    """All rows; a line that a crash left unfinished is not one."""
    path = run_dir / LOG_FILE
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            rows.append(LogRow(**json.loads(line)))
        except (json.JSONDecodeError, TypeError):
            continue
    return rows


def keep_rows_until(run_dir: Path, step: int) -> None:
    """Drop the rows after `step`: the resumed run takes these steps again."""
    lines = [json.dumps(asdict(row)) + "\n" for row in read_rows(run_dir) if row.step <= step]
    write_atomically(run_dir / LOG_FILE, "".join(lines))


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
