"""Rows through lmms-eval's evaluator, leaving the process as it was."""

import argparse
import contextlib
import os
import random
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from .opened import OpenedModel
from .task_folder import bind_tasks
from .task_rows import TaskRow


def ask(opened: OpenedModel, rows: Mapping[str, Sequence[TaskRow]]) -> dict[str, list[dict]]:
    """lmms-eval's logged samples of each task that has rows, as the model answers them.

    The random state of the process, its environment, and the model's train or eval mode are as before afterwards.
    """
    with keep_random_state(), _quiet_and_offline(opened) as scratch, _eval_mode(opened.module):
        return _simple_evaluate(opened, rows, scratch)


def _simple_evaluate(
    opened: OpenedModel, rows: Mapping[str, Sequence[TaskRow]], scratch: Path
) -> dict[str, list[dict]]:
    from lmms_eval import evaluator
    from lmms_eval.tasks import TaskManager

    bound = bind_tasks(rows, scratch / "tasks", convention=opened.convention)
    manager = TaskManager("ERROR", include_path=[str(bound)], include_defaults=False, model_name="regiontower")
    results = evaluator.simple_evaluate(
        model=opened.chat,
        tasks=[name for name, found in rows.items() if found],
        task_manager=manager,
        bootstrap_iters=0,
        log_samples=True,
        verbosity="ERROR",
        process_docs_parallel=1,
        # Without it, some of lmms-eval's tasks write into the working directory and scoring decodes every image again.
        cli_args=argparse.Namespace(
            output_path=str(scratch), process_with_media=False, reasoning_tags="none", agentic_trace_mode="basic"
        ),
    )
    if results is None:
        raise RuntimeError("lmms-eval returned no results")
    return results["samples"]


@contextlib.contextmanager
def keep_random_state() -> Iterator[None]:
    """lmms-eval seeds every generator of the process; a training run around it must not notice."""
    python, array = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():  # the CPU's and every CUDA device's
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(array)


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
