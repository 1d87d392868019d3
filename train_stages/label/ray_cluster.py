"""The shards of a run, labelled by Ray Data: on the machines of a cluster, or on this one.

Every machine needs this package, and sees the run's folder, the images and the folder of the call under the same paths
(a shared file system).
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

from ...vision_towers.errors import UserError
from .engines import find_engine
from .labeller import Labeller
from .processes import Job
from .shard import ShardPart


class ShardActor:
    """Labels the shards that Ray hands it; its models are loaded at the first."""

    def __init__(self, job: dict[str, Any], folder: str):
        os.chdir(folder)  # where names of models and files start
        self._job = Job(**job)
        self._labeller: Labeller | None = None

    def __call__(self, row: Mapping[str, Any]) -> dict[str, str]:
        """`{"index"}` -> `{"done"}`, a `ShardPart` as JSON, or `{"error"}`, the user's mistake in a sentence."""
        try:
            if self._labeller is None:
                self._labeller = self._job.open(find_engine(self._job.engine))
            part = self._job.label(int(row["index"]), self._labeller, lambda images: None)
        except UserError as error:  # raised here, Ray would wrap it into a page of its own
            return {"done": "", "error": str(error)}
        return {"done": json.dumps(asdict(part), ensure_ascii=False), "error": ""}


def label_on_ray(
    job: Job, indices: Sequence[int], processes: int, on_images: Callable[[int], None]
) -> Iterator[ShardPart]:
    """Label the shards by `processes` actors, each with models of its own (and, where `job.device` is "cuda", a GPU);
    results come as they are finished. A shard whose machine goes down is given to another one.

    The cluster is the one that `RAY_ADDRESS` names, or that this machine belongs to; without any, one of this machine's
    own is started and ended.
    Raises:
        UserError: ray is not installed; what an actor says is the user's mistake.
    """
    if not indices:
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would tell its makers
    try:
        import ray.data  # pyright: ignore[reportMissingImports] - an extra that [all] leaves out
    except ImportError:
        raise UserError("--engine ray needs Ray Data; pip install 'regiontower[ray]'.") from None
    with _cluster(ray):
        ray.data.DataContext.get_current().enable_progress_bars = False  # ours counts images
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        actors = min(processes, len(indices))
        shards = ray.data.from_items([{"index": index} for index in indices], override_num_blocks=len(indices))
        found = shards.map(
            ShardActor,  # pyright: ignore[reportArgumentType] - a class to be called, which ray takes too
            fn_constructor_kwargs={"job": asdict(replace(job, threads=1)), "folder": os.getcwd()},
            compute=ray.data.ActorPoolStrategy(size=actors),
            num_cpus=1,
            num_gpus=1 if job.device == "cuda" else 0,
        )
        for batch in found.iter_batches(batch_size=1, prefetch_batches=0):
            for text, error in zip(batch["done"], batch["error"], strict=True):
                if error:
                    raise UserError(str(error))
                part = ShardPart.from_json(str(text))
                on_images(part.result.images)
                yield part


@contextmanager
def _cluster(ray: Any) -> Iterator[None]:
    ours = not ray.is_initialized()
    if ours:
        ray.init(logging_level="error", log_to_driver=False, include_dashboard=False)
    try:
        yield
    finally:
        if ours:
            ray.shutdown()
