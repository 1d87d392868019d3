"""`evaluate`: a checkpoint and a file of region records in, numbers through lmms-eval out."""

import argparse
import contextlib
import json
import os
import random
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..mllm import load_mllm
from ..train_stages.record_io import data_hash, read_records
from ..vision_towers.errors import UserError
from .response_log import log_files
from .scoring import ANSWER_FORMAT, summarise
from .task_folder import bind_tasks, require_lmms_eval, rows_or_error
from .task_rows import TASKS, TaskRow, task_names, task_rows

if TYPE_CHECKING:
    from .lmms_model import RegionTowerChat

_STAMPED = ("regiontower", "lmms-eval", "torch", "transformers", "datasets", "numpy", "pillow")
RESULTS_NAME = "results.json"
RESPONSES_NAME = "responses.jsonl"


@dataclass(frozen=True)
class EvalResult:
    """results: what `OUT/results.json` holds. samples: task name -> its rows with question, answer, target and score,
    by doc_id, as in `OUT/samples_<task>.jsonl`. out: the folder."""

    results: dict[str, Any]
    samples: dict[str, list[dict[str, Any]]]
    out: Path

    @property
    def tasks(self) -> dict[str, dict]:
        """Task name -> `{"n", its figures, "ci95"}`."""
        return self.results["tasks"]


def evaluate(
    model: "str | Path | tuple[Any, Any] | RegionTowerChat",
    data: str | Path,
    tasks: Sequence[str] | None = None,
    out: str | Path = "eval_out",
    *,
    format: str = "records",
    image_root: str | Path | None = None,
    limit: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    batch_size: int = 16,
    progress: bool = True,
) -> EvalResult:
    """Run our tasks over `data` through lmms-eval and write `OUT/results.json` and `OUT/samples_<task>.jsonl`.

    A run that was cut off (no `results.json` in OUT) is continued from `OUT/responses.jsonl`: only what is missing is
    asked. A finished one is done again from the start. The random state of the process, and the model's train or eval
    mode, are as before afterwards.

    Args:
        model: folder or hub id of a checkpoint, or `(model, processor)` in memory, or a ready `RegionTowerChat`.
        data: file of region records.
        tasks: names out of `task_rows.TASKS`; None for all. One without a row reports n = 0 and None for its figures.
        out: folder of the results, made if needed.
        format, image_root: as `train_stages.record_io.read_records` takes them.
        limit: at most so many rows a task, spread evenly over the images.
        device, dtype: of a model that is loaded here.
        batch_size: questions a batch (not of a `RegionTowerChat`, which has its own).
        progress: show a bar with the time left on stderr.

    Raises:
        UserError: lmms-eval is not installed, several processes, an unknown task, unreadable data, no rows at all.
        Exception: whatever the model raises, as it is.
    """
    require_lmms_eval()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            "evaluate runs in one process; for several start torchrun -m lmms_eval --model regiontower with the folder "
            "that regiontower lmms-tasks prints"
        )
    started = time.monotonic()
    records = read_records(data, format=format, image_root=image_root, check_images=True)
    rows = rows_or_error(task_rows(records, tasks=task_names(tasks), limit=limit), data)
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    _start_over_if_finished(folder)
    with _keep_random_state():
        chat = _chat(model, folder, device, dtype, batch_size, progress)
        with _quiet_and_offline() as scratch, _eval_mode(chat.model):
            logged = _simple_evaluate(chat, rows, scratch)
    samples = {name: _samples(logged.get(name, []), rows[name]) for name in rows}
    results = {
        "tasks": {name: summarise(TASKS[name], found) for name, found in samples.items()},
        "model": str(model) if isinstance(model, str | Path) else type(chat.model).__name__,
        "weights_sha256": chat.weights_hash,
        "box_format": {"model": getattr(chat.processor, "box_format", None), "scored": ANSWER_FORMAT},
        "data": {
            "path": str(data),
            "sha256": data_hash(records),
            "format": format,
            "records": len(records.records),
            "bad_records": [f"{bad.line}: {bad.reason}" for bad in records.bad],
        },
        "arguments": {
            "tasks": list(rows),
            "image_root": None if image_root is None else str(image_root),
            "limit": limit,
            "device": str(chat.device),
            "dtype": dtype,
            "batch_size": chat.batch_size,
            "max_new_tokens": chat.max_new_tokens,
        },
        "versions": {name: _version(name) for name in _STAMPED},
        "seconds": round(time.monotonic() - started, 2),
    }
    for name, found in samples.items():
        _write(folder / f"samples_{name}.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found))
    # Last, and at once: its presence says that the run is complete.
    _write(folder / RESULTS_NAME, json.dumps(results, ensure_ascii=False, indent=2) + "\n")
    return EvalResult(results, samples, folder)


def _chat(model, folder: Path, device: str, dtype: str, batch_size: int, progress: bool) -> "RegionTowerChat":
    from .lmms_model import RegionTowerChat
    from .response_log import ResponseLog

    log = folder / RESPONSES_NAME
    if isinstance(model, RegionTowerChat):
        if model.log is None:
            model.log = ResponseLog(log)
        return model
    if isinstance(model, str | Path):
        module, processor = load_mllm(str(model), device=device, dtype=dtype)
    else:
        module, processor = model
    return RegionTowerChat.from_module(module, processor, batch_size=batch_size, resume=log, progress=progress)


def _simple_evaluate(
    chat: "RegionTowerChat", rows: Mapping[str, list[TaskRow]], scratch: Path
) -> dict[str, list[dict]]:
    """lmms-eval's logged samples of each task."""
    from lmms_eval import evaluator
    from lmms_eval.tasks import TaskManager

    bound = bind_tasks(rows, scratch / "tasks")
    manager = TaskManager("ERROR", include_path=[str(bound)], include_defaults=False, model_name="regiontower")
    results = evaluator.simple_evaluate(
        model=chat,
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


def _samples(logged: Sequence[Mapping], rows: Sequence[TaskRow]) -> list[dict[str, Any]]:
    """One flat dictionary a row, by doc_id. Every row must have come back."""
    by_id = {sample["doc_id"]: sample for sample in logged}
    if sorted(by_id) != list(range(len(rows))):
        raise RuntimeError(f"lmms-eval scored {len(by_id)} of {len(rows)} rows")
    flat = []
    for doc_id, row in enumerate(rows):
        flat.append(
            {
                "doc_id": doc_id,
                "image": row.image,
                "image_id": row.image_id,
                "width": row.width,
                "height": row.height,
                "region_index": row.region_index,
                "question": row.question,
                "prompt_boxes": row.prompt_boxes,
                "answer": by_id[doc_id]["filtered_resps"][0],
                "target": row.target_xyxy if row.phrase else row.answers,
                **by_id[doc_id]["prediction"],
            }
        )
    return flat


def _start_over_if_finished(folder: Path) -> None:
    """A finished run's answers are not reused (the code may have changed); an old result must not outlive a crash."""
    if not (folder / RESULTS_NAME).is_file():
        return
    for file in [*log_files(folder / RESPONSES_NAME), *(folder / f"samples_{name}.jsonl" for name in TASKS)]:
        file.unlink(missing_ok=True)
    (folder / RESULTS_NAME).unlink()


@contextlib.contextmanager
def _keep_random_state() -> Iterator[None]:
    """lmms-eval seeds every generator of the process; a training run around it must not notice."""
    python, array = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():  # the CPU's and every CUDA device's
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(array)


@contextlib.contextmanager
def _eval_mode(model: torch.nn.Module) -> Iterator[None]:
    was_training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in was_training.items():
            module.training = training


@contextlib.contextmanager
def _quiet_and_offline() -> Iterator[Path]:
    """A scratch folder for lmms-eval and datasets, no network, no log lines; what the user has set stays."""
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
        try:
            yield Path(scratch)
        finally:
            logger.enable("lmms_eval")
            for name in unset:
                os.environ.pop(name, None)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _write(path: Path, text: str) -> None:
    draft = path.with_name(path.name + ".part")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)
