"""The centres of object regions: found once, kept beside the shards, and asked for the nearest."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file
from tqdm import tqdm

from ...vision_towers.errors import UserError
from ..kmeans import find_centres, nearest_centres, open_faiss, refuse_too_many
from .branched_kmeans import branched_centres
from .shard import read_rows

SCRATCH = ".kmeans"


@dataclass(frozen=True)
class KMeansConfig:
    """clusters: K (the paper: 1 M, hierarchical). branches: 1 for one flat k-means in memory; more for two levels, see
    `branched_kmeans`, with about sqrt(K) as a good number. iterations, seed: of faiss' k-means; more regions than
    points_per_centre x clusters are sampled. probes: of branched centres, in how many branches the nearest centre of a
    region is searched; all of them make the search exact."""

    clusters: int
    branches: int = 1
    iterations: int = 20
    points_per_centre: int = 256
    seed: int = 0
    probes: int = 16

    def __post_init__(self) -> None:
        if not 1 <= self.branches <= self.clusters:
            raise UserError(f"branches is {self.branches}; it must be between 1 and the {self.clusters} clusters.")


@dataclass(frozen=True)
class Centres:
    """rows: `(K, D)` float32, length 1. branches: the first level, `(B, D)`; None for one level. probes: see
    `KMeansConfig`."""

    rows: np.ndarray
    branches: np.ndarray | None
    probes: int

    def nearest(self, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of each of float32 `(N, D)`, length 1: index and cosine of the nearest centre, `(N,)`."""
        if self.branches is None or self.probes >= len(self.branches):
            return nearest_centres(features, self.rows)
        cosines, found = self._index.search(features, 1)
        missed = np.flatnonzero(found[:, 0] < 0)  # no centre lies in the branches that were searched
        if len(missed):
            found[missed, 0], cosines[missed, 0] = nearest_centres(features[missed], self.rows)
        return found[:, 0], cosines[:, 0]

    @cached_property
    def _index(self) -> Any:
        """Centres in lists, by the branch that is nearest to each."""
        faiss = open_faiss()
        assert self.branches is not None
        count, width = self.branches.shape
        top = faiss.IndexFlatIP(width)
        top.add(self.branches)
        index = faiss.IndexIVFFlat(top, width, count, faiss.METRIC_INNER_PRODUCT)
        index.is_trained = True
        index.add(self.rows)
        index.nprobe = self.probes
        return index


def find_or_open(target: Path, folder: Path, indices: list[int], config: KMeansConfig, progress: bool) -> Centres:
    """The centres that lie at `target`; or those of the regions that `folder` holds in the finished shards `indices`,
    found now and written there. Broken off, it goes on where it stood.

    Raises:
        UserError: those at `target` are of another k-means; there are fewer than two regions a cluster; faiss is not
            installed.
    """
    wanted = json.dumps(asdict(config))
    if target.exists():
        with safe_open(target, "np") as file:
            held = file.metadata()["kmeans"]
            if held != wanted:
                raise UserError(
                    f"{target} is of another k-means ({held}): delete it to cluster the same regions anew, or choose a "
                    "new folder."
                )
            return _centres({name: file.get_tensor(name) for name in file.keys()}, config)  # noqa: SIM118
    open_faiss()
    scratch = _scratch(target.parent, wanted)
    total = sum(len(rows) for rows in _samples(folder, indices, config.seed, progress)(1.0))
    refuse_too_many(config.clusters, total)
    tensors = _found(_samples(folder, indices, config.seed, progress), total, config, scratch, progress)
    part = target.with_name(f".{target.name}.part")
    save_file(tensors, part, metadata={"kmeans": wanted})
    part.replace(target)
    shutil.rmtree(scratch)
    return _centres(tensors, config)


def candidate_rows(rows: np.ndarray) -> np.ndarray:
    """Which rows belong to candidates; the others are NaN."""
    return np.flatnonzero(~np.isnan(rows[:, 0]))


def _found(
    samples: Callable[[float], Iterator[np.ndarray]], total: int, config: KMeansConfig, scratch: Path, progress: bool
) -> dict[str, np.ndarray]:
    if config.branches == 1:
        rows = np.concatenate(list(samples(min(1.0, config.points_per_centre * config.clusters / total))))
        return {"centres": find_centres(rows, config.clusters, iterations=config.iterations, seed=config.seed)}
    with tqdm(total=config.branches, desc="k-means", unit="branch", disable=not progress) as bar:

        def on_branch() -> None:
            bar.update()

        centres, branches = branched_centres(
            samples,
            total,
            config.clusters,
            config.branches,
            config.points_per_centre,
            config.iterations,
            config.seed,
            scratch,
            on_branch,
        )
    return {"centres": centres, "branches": branches}


def _centres(tensors: dict[str, np.ndarray], config: KMeansConfig) -> Centres:
    return Centres(tensors["centres"], tensors.get("branches"), config.probes)


def _scratch(folder: Path, wanted: str) -> Path:
    """What an unfinished k-means of the same settings left is kept; of others, removed."""
    place = folder / SCRATCH
    note = place / "settings.json"
    if not note.is_file() or note.read_text("utf-8") != wanted:
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        note.write_text(wanted, encoding="utf-8")
    return place


def _samples(folder: Path, indices: list[int], seed: int, progress: bool) -> Callable[[float], Iterator[np.ndarray]]:
    def rows(share: float) -> Iterator[np.ndarray]:
        for index in tqdm(indices, "features", unit="shard", disable=not progress, leave=False):
            found = read_rows(folder, index)
            chosen = candidate_rows(found)
            if share < 1.0:
                chosen = chosen[np.random.default_rng((seed, index)).random(len(chosen)) < share]
            yield found[chosen].astype(np.float32)

    return rows
