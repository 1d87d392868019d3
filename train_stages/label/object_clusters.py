"""The second half of RICE's object labels: k-means over the features of all regions, and the nearest centre of each.

y_ij = argmin_k || f_ij - c_k ||_2        (arXiv 2507.20025, Eq. 1)
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import save_file

from ...vision_towers.errors import UserError
from ..engine.manifest import write_atomically
from ..record_io import read_records
from ..region_clusters import MIN_POINTS
from .cluster_page import Nearest, cluster_page
from .objects import ENGINE, ObjectsConfig
from .plan import ImageSource, find_images
from .run import LABELS, LabelResult, RunConfig, label_images, remove_labels
from .shard import PARTS, finished_shards, read_rows, shard_path, write_shard

REGIONS = "regions"  # folder of the first half
CENTRES = "centres.safetensors"
PAGE = "clusters.png"  # written last


@dataclass(frozen=True)
class KMeansConfig:
    """clusters: K (the paper: 1 M, hierarchical; here flat). iterations, seed: of faiss' k-means; more regions than
    points_per_centre x clusters are sampled."""

    clusters: int
    iterations: int = 20
    points_per_centre: int = 256
    seed: int = 0


def label_objects(
    config: ObjectsConfig, kmeans: KMeansConfig, source: ImageSource, out: str | Path, run: RunConfig | None = None
) -> LabelResult:
    """Label every image of `source` with regions and their clusters: shards into the folder `out`, beside them the
    centres (`(K, D)`, length 1), and a page of regions that lie nearest to some of them.

    The folder `out/regions` holds what k-means needs and can be deleted afterwards. Arguments and errors as of
    `label_images`; moreover fewer than two regions a cluster, and centres of another k-means, are a UserError.
    """
    run = run or RunConfig()
    folder = Path(out)
    if run.overwrite and (folder / REGIONS).is_dir():
        ENGINE.facts(config)  # what is wrong with them comes before anything is removed
        find_images(source)
        remove_labels(folder)
        for name in (CENTRES, PAGE):
            (folder / name).unlink(missing_ok=True)
    elif not (folder / REGIONS).is_dir() and any(folder.glob("[0-9]*.*")):
        raise UserError(f"{folder} holds records already; choose a new folder.")
    inner = folder / REGIONS
    result = label_images(ENGINE, config, source, inner, replace(run, form="jsonl"))
    indices = [shard.index for shard in finished_shards(inner) if shard.records]
    paths = [shard_path(folder, index, run.form) for index in indices]
    centres = _centres(inner, folder / CENTRES, kmeans, indices)
    if not (folder / PAGE).exists():
        shutil.rmtree(folder / PARTS, ignore_errors=True)
        (folder / PARTS).mkdir()
        nearest = Nearest(range(0, kmeans.clusters, max(1, kmeans.clusters // 12)))
        for index, path in zip(indices, paths, strict=True):
            _assign(inner, index, path, centres, run.form, nearest)
        shutil.rmtree(folder / PARTS)
        write_atomically(folder / LABELS, (inner / LABELS).read_text(encoding="utf-8"))
        _save_page(cluster_page(nearest), folder / PAGE)
    return replace(result, folder=folder, shards=paths)


def _centres(inner: Path, target: Path, config: KMeansConfig, indices: list[int]) -> np.ndarray:
    """`(K, D)` float32: those of an earlier run, or of faiss' k-means over a sample of the rows."""
    wanted = json.dumps(asdict(config))
    if target.exists():
        with safe_open(target, "np") as file:
            held, centres = file.metadata()["kmeans"], file.get_tensor("centres")
        if held != wanted:
            raise UserError(
                f"{target} is of another k-means ({held}): delete it to cluster the same regions anew, or choose a new "
                "folder."
            )
        return centres
    (target.parent / PAGE).unlink(missing_ok=True)  # of centres that are gone
    try:
        import faiss
    except ImportError as error:
        raise UserError("clustering needs faiss; install it with: pip install 'regiontower[label]'") from error
    total = sum(len(rows) for _, rows in _rows(inner, indices))
    if total < MIN_POINTS * config.clusters:
        raise UserError(
            f"{total} regions are too few for {config.clusters} clusters; ask for at most {total // MIN_POINTS}."
        )
    share = min(1.0, config.points_per_centre * config.clusters / total)
    sample = np.concatenate([_sample(rows, share, config.seed, index) for index, rows in _rows(inner, indices)])
    kmeans = faiss.Kmeans(
        sample.shape[1],
        config.clusters,
        niter=config.iterations,
        seed=config.seed,
        spherical=True,
        max_points_per_centroid=len(sample),
    )
    kmeans.train(sample)
    assert kmeans.centroids is not None
    part = target.with_name(f".{target.name}.part")
    save_file({"centres": kmeans.centroids}, part, metadata={"kmeans": wanted})
    part.replace(target)
    return kmeans.centroids


def _rows(inner: Path, indices: list[int]) -> Iterator[tuple[int, np.ndarray]]:
    """The features of each shard's candidates, float32."""
    for index in indices:
        rows = read_rows(inner, index).astype(np.float32)
        yield index, rows[~np.isnan(rows[:, 0])]


def _sample(rows: np.ndarray, share: float, seed: int, index: int) -> np.ndarray:
    chosen = np.random.default_rng((seed, index)).random(len(rows)) < share
    return rows if share == 1.0 else rows[chosen]


def _assign(inner: Path, index: int, path: Path, centres: np.ndarray, form: str, nearest: Nearest) -> None:
    """Write a shard anew, its candidates with their clusters."""
    import faiss

    rows = read_rows(inner, index).astype(np.float32)
    candidates = np.flatnonzero(~np.isnan(rows[:, 0]))
    search = faiss.IndexFlatL2(centres.shape[1])
    search.add(centres)
    distances, found = search.search(rows[candidates], 1)
    labels = zip(candidates.tolist(), found[:, 0].tolist(), distances[:, 0].tolist(), strict=True)
    clusters = {row: (cluster, distance) for row, cluster, distance in labels}
    shard = read_records(shard_path(inner, index, "jsonl"))
    records, start = [], 0
    for record in shard.records:
        image = os.path.abspath(inner / record.image)
        regions = []
        for row, region in enumerate(record.regions, start):
            if row in clusters:
                cluster, distance = clusters[row]
                region = region.model_copy(update={"cluster": cluster})
                nearest.offer(cluster, distance, image, region.box_xyxy)
            regions.append(region)
        start += len(record.regions)
        records.append(record.model_copy(update={"image": image, "regions": regions}))
    write_shard(records, path.parent / PARTS, path, form)
    (path.parent / PARTS / path.name).replace(path)


def _save_page(page: Image.Image, target: Path) -> None:
    part = target.with_name(f".{target.name}.part")
    page.save(part, "PNG")
    part.replace(target)
