"""The training engine that all stages share: transformers' Trainer with parts, checks, resume and a run directory."""

from .arguments import join_processes
from .audit import AuditError, AuditResult
from .held_out import HeldOut
from .interrupt import StageInterrupted
from .parts import Part, apply_parts, part_rows, trainability_table
from .run import StageResult, finished_result, run_stage
from .streamed import StreamedDataset
from .throughput import Work

__all__ = [
    "AuditError",
    "AuditResult",
    "HeldOut",
    "Part",
    "StageInterrupted",
    "StageResult",
    "StreamedDataset",
    "Work",
    "apply_parts",
    "finished_result",
    "join_processes",
    "part_rows",
    "run_stage",
    "trainability_table",
]
