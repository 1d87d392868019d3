"""The written side of a run: stage.json, log.jsonl, eval.jsonl, loss.png and the model files, kept by process 0."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..atomic_write import sync, sync_tree
from ..recipe import dump_recipe
from .audit import AuditResult
from .manifest import write_stage
from .plots import PLOT_FILE, plot_run
from .run_dir import CHECKPOINTS, RECIPE_FILE
from .run_log import EVAL_FILE, LOG_FILE, EvalRow, LogRow, append_row, keep_rows_until, tail_means
from .schedule import Clock

_MODEL_BESIDE = ".model"


@dataclass
class RunBook:
    """Keeps a run directory's files in step with the run. With `enabled=False` (processes 1, 2, ...) it does nothing.

    `stage` is the content of stage.json as far as it is known at the start.
    """

    run_dir: Path
    stage: dict[str, Any]
    clock: Clock
    enabled: bool = True
    _rows: list[LogRow] = field(default_factory=list)
    _evals: list[EvalRow] = field(default_factory=list)

    def open(self, recipe: object) -> None:
        """Write recipe.yaml and stage.json; drop log rows and half-written files behind the point of resumption."""
        if not self.enabled:
            return
        dump_recipe(recipe, self.run_dir / RECIPE_FILE)
        sync(self.run_dir / RECIPE_FILE)
        for leftover in (self.run_dir / CHECKPOINTS).glob("checkpoint-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        shutil.rmtree(self.run_dir / _MODEL_BESIDE, ignore_errors=True)
        self._rows = keep_rows_until(self.run_dir / LOG_FILE, self.clock.step, LogRow)
        self._evals = keep_rows_until(self.run_dir / EVAL_FILE, self.clock.step, EvalRow)
        self._write("running")

    def row(self, row: LogRow) -> None:
        """One more row of log.jsonl."""
        if self.enabled:
            self._rows.append(row)
            append_row(self.run_dir / LOG_FILE, row)

    def evaluated(self, row: EvalRow) -> None:
        """One more row of eval.jsonl."""
        if self.enabled:
            self._evals.append(row)
            append_row(self.run_dir / EVAL_FILE, row)

    def audit(self, result: AuditResult) -> None:
        """Note the check after step 1."""
        if self.enabled:
            self.stage["audit"] = asdict(result)
            self._write("running")

    def model(self, save: Callable[[Path], None]) -> None:
        """Let `save` write into a folder beside, then move its files into the run directory.

        All of it is on the disk afterwards: a run that is called finished is never done again.
        """
        beside = self.run_dir / _MODEL_BESIDE
        beside.mkdir()
        save(beside)
        sync_tree(beside)
        for path in sorted(beside.iterdir()):
            target = self.run_dir / path.name
            if target.is_dir():
                shutil.rmtree(target)
            os.replace(path, target)
        beside.rmdir()
        sync(self.run_dir)

    def close(self, status: str) -> None:
        """Draw the plot and write the last stage.json of this session ("finished" or "interrupted")."""
        if self.enabled:
            title = f"{self.stage['stage']}: {self.clock.step} steps, {self.clock.elapsed / 60:.1f} min"
            plot_run(self._rows, self._evals, self.run_dir / PLOT_FILE, title)
            self._write(status)

    def _write(self, status: str) -> None:
        final_loss, metrics = tail_means(self._rows)
        held_out = self._evals[-1].figures if self._evals else {}
        best = min(self._rows, key=lambda row: row.loss, default=None)
        self.stage |= {
            "status": status,
            "steps": self.clock.step,
            "seconds": round(self.clock.elapsed, 3),
            "samples": self._rows[-1].samples if self._rows else 0,
            "final_loss": final_loss,
            "best_loss": {"loss": best.loss, "step": best.step} if best else None,
            "metrics": metrics | {f"held_out_{name}": value for name, value in held_out.items()},
        }
        write_stage(self.run_dir, self.stage)
