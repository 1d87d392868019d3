"""Rows through lmms-eval's evaluator, leaving the process as it was."""

import argparse
import contextlib
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .opened import OpenedModel
from .random_state import keep_random_state
from .task_folder import bind_tasks
from .task_rows import TaskRow


def ask(opened: OpenedModel, rows: Mapping[str, Sequence[TaskRow]]) -> dict[str, list[dict]]:
    """lmms-eval's logged samples of each task that has rows, as the model answers them.

    The random state of the process, its environment, and the model's train or eval mode are as before afterwards.
    """
    with _quiet_and_offline(opened) as scratch:
        bound = bind_tasks(rows, scratch / "tasks", convention=opened.convention)
        names = [name for name, found in rows.items() if found]
        results = run_tasks(opened.chat, opened.module, names, scratch, include_path=[str(bound)])
    if results is None:
        raise RuntimeError("lmms-eval returned no results")
    return results["samples"]


def run_tasks(
    model: Any, module: torch.nn.Module | None, tasks: Sequence[Any], scratch: Path, **tasks_from: Any
) -> dict[str, Any] | None:
    """lmms-eval's results and samples; None in all processes but the first.

    Args:
        model: an `lmms` instance. module: its weights, where it shows them.
        tasks: names, or task objects of lmms-eval.
        scratch: folder for what tasks write on the side.
        tasks_from: of lmms-eval's `TaskManager`, where to look for the names.
    """
    from lmms_eval import evaluator
    from lmms_eval.tasks import TaskManager

    with keep_random_state(), _eval_mode(module):
        return evaluator.simple_evaluate(
            model=model,
            tasks=list(tasks),
            task_manager=TaskManager("ERROR", include_defaults=False, model_name="regiontower", **tasks_from),
            bootstrap_iters=0,
            log_samples=True,
            verbosity="ERROR",
            process_docs_parallel=1,
            # Without it some tasks write into the working directory, and scoring decodes every image again.
            cli_args=argparse.Namespace(
                output_path=str(scratch), process_with_media=False, reasoning_tags="none", agentic_trace_mode="basic"
            ),
        )


@contextlib.contextmanager
def _eval_mode(model: torch.nn.Module | None) -> Iterator[None]:
    if model is None:
        yield
        return
    was_training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in was_training.items():
            module.training = training


@contextlib.contextmanager
def _quiet_and_offline(opened: OpenedModel) -> Iterator[Path]:
    """A scratch folder for lmms-eval and datasets, no network, no log lines but those of other model classes, which may
    be the only ones to tell of an error; what the user has set stays."""
    from loguru import logger

    with tempfile.TemporaryDirectory(prefix="regiontower-eval-") as scratch:
        wanted = {
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_OFFLINE": "1",
            "LMMS_EVAL_DATASETS_CACHE": str(Path(scratch) / "datasets"),
        }
        unset = [name for name in wanted if name not in os.environ]
        os.environ.update({name: wanted[name] for name in unset})
        logger.disable("lmms_eval")
        if opened.convention is not None:
            logger.enable("lmms_eval.models")
        try:
            yield Path(scratch)
        finally:
            logger.enable("lmms_eval")
            for name in unset:
                os.environ.pop(name, None)
