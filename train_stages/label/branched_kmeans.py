"""K-means in two levels, for more centres than one k-means can find: the rows are parted among a few branches first,
and each branch is clustered by itself, with its share of the centres. Rows lie on disk; one branch at a time is in
memory.

The paper (arXiv 2507.20025, Sec. 3.1) says of its million of centres that they are found hierarchically, and no more.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from ..kmeans import find_centres, nearest_centres

_HELD_BYTES = 2**28  # of rows that wait to be appended to their branch's file

Samples = Callable[[float], Iterator[np.ndarray]]
"""Share of the rows -> float32 `(N, D)`, some at a time; the same each time."""


def branched_centres(
    samples: Samples,
    total: int,
    clusters: int,
    branches: int,
    points_per_centre: int,
    iterations: int,
    seed: int,
    scratch: Path,
    on_branch: Callable[[], None] = lambda: None,
) -> tuple[np.ndarray, np.ndarray]:
    """`(K, D)` centres and `(B, D)` branches, float32, length 1.

    total: number of rows that `samples(1.0)` gives, at least K. points_per_centre: rows above so many a centre are
    sampled, at both levels. scratch: folder for what is finished; the same call takes it up again where it was broken
    off. on_branch: called after each.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    top = scratch / "branches.npy"
    if not top.exists():
        rows = np.concatenate(list(samples(min(1.0, points_per_centre * branches / total))))
        _save(top, find_centres(rows, min(branches, len(rows)), iterations=iterations, seed=seed))
    directions = np.load(top)
    buckets = scratch / "rows"
    if not buckets.is_dir():
        _part(samples(min(1.0, points_per_centre * clusters / total)), directions, buckets)
    width = directions.shape[1]
    counts = [path.stat().st_size // (2 * width) for path in sorted(buckets.iterdir())]
    found = []
    for branch, wanted in enumerate(share_out(counts, clusters)):
        done = scratch / f"centres-{branch:05d}.npy"
        if wanted and not done.exists():
            rows = np.fromfile(_bucket(buckets, branch), np.float16).reshape(-1, width).astype(np.float32)
            _save(done, find_centres(rows, wanted, iterations=iterations, seed=seed))
        if wanted:
            found.append(np.load(done))
        on_branch()
    return np.concatenate(found), directions


def share_out(counts: list[int], clusters: int) -> list[int]:
    """Centres for each branch, `clusters` in all: in proportion to its rows, and no more than it has."""
    wanted = np.array(counts, dtype=float) * clusters / sum(counts)
    given = np.minimum(np.floor(wanted).astype(int), counts)
    order = np.argsort(given - wanted, kind="stable")  # the largest remainder first
    while (left := clusters - int(given.sum())) > 0:
        roomy = [branch for branch in order if given[branch] < counts[branch]]
        given[roomy[:left]] += 1
    return given.tolist()


def _part(rows: Iterator[np.ndarray], directions: np.ndarray, target: Path) -> None:
    """A file of float16 rows for each branch; the folder appears whole or not at all."""
    part = target.with_name(f".{target.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    waiting: list[list[np.ndarray]] = [[] for _ in directions]
    held = 0

    def append() -> None:
        for branch, chunks in enumerate(waiting):
            with _bucket(part, branch).open("ab") as file:
                for chunk in chunks:
                    file.write(chunk.tobytes())
            chunks.clear()

    for some in rows:
        branches, _ = nearest_centres(some, directions)
        half = some.astype(np.float16)
        for branch in np.unique(branches):
            waiting[branch].append(half[branches == branch])
        held += half.nbytes
        if held > _HELD_BYTES:
            append()
            held = 0
    append()
    part.rename(target)


def _bucket(folder: Path, branch: int) -> Path:
    return folder / f"{branch:05d}.f16"


def _save(target: Path, array: np.ndarray) -> None:
    part = target.with_name(f".{target.name}.part")
    with part.open("wb") as file:
        np.save(file, array)
    os.replace(part, target)
