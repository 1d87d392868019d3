"""The shards of a run, labelled here or by several processes of this machine."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter

from ...mllm.load import DTYPES
from ...vision_towers.errors import UserError
from .labeller import Engine, Labeller, Workplace
from .shard import ShardPart, label_shard


@dataclass(frozen=True)
class Job:
    """What a process has to know of a run; JSON can say it.

    engine: name. settings: of the engine, as JSON. folder: of the run. form, batch_size: see `label_shard`. device,
    dtype, threads, source: see `Workplace`.
    """

    engine: str
    settings: dict[str, Any]
    folder: str
    form: str
    batch_size: int
    device: str
    dtype: str
    threads: int
    source: str

    def open(self, engine: Engine) -> Labeller:
        """The engine with its models loaded."""
        settings = TypeAdapter(engine.config).validate_python(self.settings)
        return engine.open(settings, Workplace(self.device, DTYPES.get(self.dtype), self.threads, self.source))

    def label(self, index: int, labeller: Labeller, on_images: Callable[[int], None]) -> ShardPart:
        """Label a shard of the run."""
        return label_shard(Path(self.folder), index, self.form, labeller, self.batch_size, on_images)


def label_here(
    job: Job, engine: Engine, indices: Sequence[int], on_images: Callable[[int], None]
) -> Iterator[ShardPart]:
    """Label the shards one after the other in this process."""
    if indices:
        labeller = job.open(engine)
        for index in indices:
            yield job.label(index, labeller, on_images)


def label_in_processes(
    job: Job, indices: Sequence[int], processes: int, on_images: Callable[[int], None]
) -> Iterator[ShardPart]:
    """Label the shards in `processes` processes, each with models of its own; results come as they are finished. On a
    machine with several GPUs they are dealt out.

    Raises:
        UserError: what a process says is the user's mistake.
    """
    waiting = iter(indices)
    next_index = threading.Lock()
    results: queue.Queue[ShardPart | int | Exception | None] = queue.Queue()
    count = min(processes, len(indices))
    workers = [_start(job, number, count) for number in range(count)]

    def take() -> int | None:
        with next_index:
            return next(waiting, None)

    def serve(worker: subprocess.Popen[str]) -> None:
        try:
            while (index := take()) is not None:
                for message in _ask(worker, index):
                    results.put(message)
            results.put(None)
        except Exception as error:  # handed to the caller's thread, which raises it
            results.put(error)

    threads = [threading.Thread(target=serve, args=(worker,), daemon=True) for worker in workers]
    try:
        for thread in threads:
            thread.start()
        busy = len(workers)
        while busy:
            message = results.get()
            if message is None:
                busy -= 1
            elif isinstance(message, Exception):
                raise message
            elif isinstance(message, int):
                on_images(message)
            else:
                yield message
    finally:
        for worker in workers:
            worker.terminate()
        for worker in workers:
            worker.communicate()


def _start(job: Job, number: int, processes: int) -> subprocess.Popen[str]:
    """A worker. A plain command rather than multiprocessing: spawn would run the caller's main script again, and fork
    is not safe beside the threads of torch."""
    gpus = torch.cuda.device_count() if job.device == "cuda" else 0
    device = f"cuda:{number % gpus}" if gpus > 1 else job.device
    mine = replace(job, device=device, threads=max(1, (os.cpu_count() or 1) // processes))
    command = [sys.executable, "-m", f"{__package__}.worker", json.dumps(asdict(mine))]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8")


def _ask(worker: subprocess.Popen[str], index: int) -> Iterator[ShardPart | int]:
    """Have a worker label a shard: numbers of images on the way, then the result."""
    assert worker.stdin is not None and worker.stdout is not None
    try:
        worker.stdin.write(f"{index}\n")
        worker.stdin.flush()
    except BrokenPipeError:
        pass  # what it says last tells why
    for line in worker.stdout:
        kind, _, rest = line.partition(" ")
        if kind == "images":
            yield int(rest)
        elif kind == "done":
            yield ShardPart.from_json(rest)
            return
        else:
            raise UserError(json.loads(rest))
    raise RuntimeError(f"a label process ended too early (exit status {worker.wait()}); its error is above")
