"""`evaluate_suite`: a checkpoint through built-in tasks of lmms-eval, numbers and answers out."""

from __future__ import annotations

import contextlib
import math
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .intervals import mean_interval
from .lmms_run import run_tasks
from .opened import OpenedModel, Opening, open_model
from .report import REPORT_NAME, write_builtin_report
from .run import (
    RESPONSES_NAME,
    RESULTS_NAME,
    EvalResult,
    samples_file,
    stamp,
    start_over_if_finished,
    write_json,
    write_rows,
)
from .suite_data import SuiteData, find_data, rows_at_most
from .suites import BUILT_INS, BuiltIn, suite_tasks
from .task_folder import require_lmms_eval

if TYPE_CHECKING:
    from .opened import Model


def evaluate_suite(
    model: Model,
    suite: str,
    out: str | Path,
    *,
    data_root: str | Path | None = None,
    tasks: Sequence[str] | None = None,
    limit: int | None = None,
    how: Opening | None = None,
) -> EvalResult | None:
    """Ask a model the built-in tasks of a suite and write `OUT/results.json`, `OUT/report.html` and
    `OUT/samples_<task>.jsonl`.

    A run that was cut off (no `results.json` in OUT) is continued from `OUT/responses.jsonl`; a finished one is done
    again. Under torchrun each process takes its share of the rows, and all but the first return None.

    Args:
        model: as `opened.open_model` takes it.
        suite: "ocr" or "general". tasks: some of its tasks (`suites.SUITES`); all when absent.
        out: folder of the results, made if needed.
        data_root: see `suite_data.find_data`.
        limit: at most so many rows a task, spread evenly over its file.
        how: the model is opened and asked; as `Opening` says by itself when absent.

    Raises:
        UserError: lmms-eval is not installed, an unknown suite or task, data that are missing or of another kind.
        Exception: whatever the model raises, as it is.
    """
    require_lmms_eval()
    how = how or Opening()
    started = time.monotonic()
    found = find_data(suite_tasks(suite, tasks), data_root)
    folder = Path(out)
    _prepare(folder)
    opened = open_model(model, folder / RESPONSES_NAME, how)
    # Another class of model is asked as it is: what stands around it (`foreign`) knows rows of our own tasks only.
    asked = opened.chat if opened.convention is None else opened.chat.inner
    with _scratch() as scratch:
        evaluated = run_tasks(asked, opened.module, [_task(data, limit, asked.is_simple) for data in found], scratch)
    if evaluated is None:
        return None
    samples = {data.task.name: _samples(evaluated["samples"][_lmms_name(data)]) for data in found}
    results = {
        "suite": suite,
        "tasks": {
            data.task.name: _figures(
                data.task, evaluated["results"][_lmms_name(data)], samples[data.task.name], _pictures(opened, data)
            )
            for data in found
        },
        "model": opened.name,
        "weights_sha256": opened.weights_sha256,
        "data": {data.task.name: {"task": _lmms_name(data), **data.source} for data in found},
        "arguments": {"limit": limit, "dtype": how.dtype, "quant": how.quant, **opened.arguments},
        **stamp(opened),
        "seconds": round(time.monotonic() - started, 2),
    }
    for name, rows in samples.items():
        write_rows(samples_file(folder, name), rows)
    result = EvalResult(results, samples, folder)
    write_builtin_report(result)
    # Last: its presence says that the run is complete.
    write_json(folder / RESULTS_NAME, results)
    return result


def _prepare(folder: Path) -> None:
    """As `run.evaluate` does; the first process alone, before any other reads the log."""
    from .lmms_model import process_group

    group = process_group()
    if group is None or group.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        start_over_if_finished(folder, [folder / REPORT_NAME, *(samples_file(folder, name) for name in BUILT_INS)])
    if group is not None:
        group.wait_for_everyone()


def _task(data: SuiteData, limit: int | None, simple: bool) -> Any:
    """The built-in task, as it is but for its data, its rows and what is computed of the answers."""
    from lmms_eval.api.task import ConfigurableMessagesTask, ConfigurableTask

    config = _built_in(data.task)
    data.configure(config)
    config["process_docs"] = partial(rows_at_most, limit=limit, block=data.task.rows_in_a_block)
    config["metric_list"] = [metric for metric in config["metric_list"] if metric["metric"] in data.task.metrics]
    if data.task.name == "ocrbench":
        # Its own sums up in a variable of the module, run after run, and divides by 1000 whatever the number of rows.
        config["metric_list"][0]["aggregation"] = _mean_score
    kind = ConfigurableTask if simple else ConfigurableMessagesTask
    return kind(config=config, model_name="regiontower")


def _built_in(task: BuiltIn) -> dict[str, Any]:
    import lmms_eval.tasks
    from lmms_eval.utils import load_yaml_config

    return load_yaml_config(str(Path(lmms_eval.tasks.__file__).parent / task.yaml))


def _lmms_name(data: SuiteData) -> str:
    return Path(data.task.yaml).stem


def _mean_score(items: Sequence[Mapping[str, float]]) -> float:
    return sum(item["score"] for item in items) / len(items)


def _samples(logged: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """By doc_id: question, answer, target and what the task computed of them."""
    dropped = {"doc", "doc_id", "doc_hash", "target", "arguments", "resps", "filtered_resps", "token_counts"}
    dropped |= {"input_media"}
    return [
        {
            "doc_id": sample["doc_id"],
            "question": sample["arguments"][0],
            "answer": _first(sample["filtered_resps"]),
            "target": sample["target"],
            **{name: value for name, value in sample.items() if name not in dropped},
        }
        for sample in sorted(logged, key=lambda sample: sample["doc_id"])
    ]


def _first(replies: Any) -> str:
    while isinstance(replies, list | tuple):  # filters nest them differently
        replies = replies[0]
    return str(getattr(replies, "text", replies))


def _figures(
    task: BuiltIn, results: Mapping[str, Any], samples: Sequence[Mapping[str, Any]], pictures: Mapping[int, str]
) -> dict[str, Any]:
    """`{"n", metric: value, ..., "ci95"}`; a metric that no row has a part in is None."""
    figures: dict[str, Any] = {"n": len(samples)}
    intervals: dict[str, list[float] | None] = {}
    for metric in task.metrics:
        values = [value for name, value in results.items() if name.split(",")[0] == metric]
        value = values[0] if values and isinstance(values[0], int | float) and math.isfinite(values[0]) else None
        figures[metric] = value
        intervals[metric] = _interval(metric, samples, pictures) if metric in task.means else None
    return {**figures, "ci95": intervals}


def _interval(metric: str, samples: Sequence[Mapping[str, Any]], pictures: Mapping[int, str]) -> list[float] | None:
    rows = [sample for sample in samples if sample.get(metric) is not None]
    if not rows:
        return None
    scores = [float(row[metric]["score"] if isinstance(row[metric], Mapping) else row[metric]) for row in rows]
    return list(mean_interval(scores, [pictures.get(row["doc_id"], str(row["doc_id"])) for row in rows]))


def _pictures(opened: OpenedModel, data: SuiteData) -> dict[int, str]:
    """doc_id -> what its picture is told apart by: questions about one picture are not independent."""
    shown: Mapping[tuple[str, int], str] = getattr(opened.chat, "shown", {})
    return {doc_id: picture for (task, doc_id), picture in shown.items() if task == _lmms_name(data)}


@contextlib.contextmanager
def _scratch() -> Iterator[Path]:
    """A folder for what tasks write on the side; none of lmms-eval's log lines."""
    from loguru import logger

    with tempfile.TemporaryDirectory(prefix="regiontower-suite-") as scratch:
        logger.disable("lmms_eval")
        try:
            yield Path(scratch)
        finally:
            logger.enable("lmms_eval")
