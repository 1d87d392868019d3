"""The second half of RICE's object labels: k-means over the features of all regions, and the nearest centre of each.

y_ij = argmin_k || f_ij - c_k ||_2        (arXiv 2507.20025, Eq. 1)

Features and centres have length 1, so the nearest centre is the one of the largest cosine.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from ...vision_towers.errors import UserError
from ..atomic_write import write_atomically
from ..record_io import read_records
from .centres import SCRATCH, Centres, KMeansConfig, candidate_rows, find_or_open
from .cluster_page import Nearest, cluster_page, shown_clusters
from .objects import ENGINE, ObjectsConfig
from .one_run import only_run
from .plan import ImageSource, find_images
from .run import LABELS, LabelResult, RunConfig, label_images, remove_labels
from .shard import FORMATS, PARTS, finished_shards, read_rows, shard_path, write_shard

REGIONS = "regions"  # folder of the first half
CENTRES = "centres.safetensors"
PAGE = "clusters.png"  # written last
ASSIGNED = ".assigned"  # of shards that are finished; removed after the page is written


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
    with only_run(folder):
        return _label_objects(config, kmeans, source, folder, run)


def _label_objects(
    config: ObjectsConfig, kmeans: KMeansConfig, source: ImageSource, folder: Path, run: RunConfig
) -> LabelResult:
    inner = folder / REGIONS
    if run.overwrite and inner.is_dir():
        ENGINE.facts(config)  # what is wrong with them comes before anything is removed
        find_images(source)
        _remove(folder)
    elif not inner.is_dir() and any(folder.glob("[0-9]*.*")):
        raise UserError(f"{folder} holds records already; choose a new folder.")
    result = label_images(ENGINE, config, source, inner, replace(run, form="jsonl"))
    indices = [shard.index for shard in finished_shards(inner) if shard.records]
    paths = [shard_path(folder, index, run.form) for index in indices]
    if any(shard_path(folder, index, form).exists() for index in indices for form in FORMATS if form != run.form):
        raise UserError(f"{folder} holds shards of another --form; choose a new folder or use --overwrite.")
    if not (folder / CENTRES).exists():  # what was made of centres that are gone is gone, too
        (folder / PAGE).unlink(missing_ok=True)
        shutil.rmtree(folder / ASSIGNED, ignore_errors=True)
    centres = find_or_open(folder / CENTRES, inner, indices, kmeans, run.progress)
    if not (folder / PAGE).exists():
        _assign_all(folder, indices, paths, centres, kmeans, run, result.source)
    return replace(result, folder=folder, shards=paths)


def _assign_all(
    folder: Path,
    indices: list[int],
    paths: list[Path],
    centres: Centres,
    kmeans: KMeansConfig,
    run: RunConfig,
    source: str,
) -> None:
    """Every shard with its clusters, what is known of them, and last the page."""
    shutil.rmtree(folder / PARTS, ignore_errors=True)
    (folder / PARTS).mkdir()
    (folder / ASSIGNED).mkdir(exist_ok=True)
    shown = shown_clusters(kmeans.clusters)
    nearest = Nearest(shown)
    for index, path in zip(tqdm(indices, "clusters", unit="shard", disable=not run.progress), paths, strict=True):
        note = folder / ASSIGNED / f"{index:05d}.json"
        if not note.exists() or not path.exists():
            in_shard = Nearest(shown)
            _assign(folder / REGIONS, index, path, centres, run.form, in_shard)
            write_atomically(note, json.dumps(in_shard.offers()))
        for offer in json.loads(note.read_text("utf-8")):
            nearest.offer(*offer)
    shutil.rmtree(folder / PARTS)
    facts = json.loads((folder / REGIONS / LABELS).read_text(encoding="utf-8"))
    facts[source]["clusters"] = {**asdict(kmeans), "centres": CENTRES}
    write_atomically(folder / LABELS, json.dumps(facts, indent=2, ensure_ascii=False) + "\n")
    _save_page(cluster_page(nearest, folder), folder / PAGE)
    shutil.rmtree(folder / ASSIGNED)


def _remove(folder: Path) -> None:
    remove_labels(folder)
    for name in (CENTRES, PAGE):
        (folder / name).unlink(missing_ok=True)
    for name in (SCRATCH, ASSIGNED):
        shutil.rmtree(folder / name, ignore_errors=True)


def _assign(inner: Path, index: int, path: Path, centres: Centres, form: str, nearest: Nearest) -> None:
    """Write a shard anew, its candidates with their clusters."""
    rows = read_rows(inner, index)
    candidates = candidate_rows(rows)
    found, cosines = centres.nearest(rows[candidates].astype(np.float32))
    labels = zip(candidates.tolist(), found.tolist(), cosines.tolist(), strict=True)
    clusters = {row: (cluster, cosine) for row, cluster, cosine in labels}
    shard = read_records(shard_path(inner, index, "jsonl"))
    records, start = [], 0
    for record in shard.records:
        image = os.path.abspath(inner / record.image)
        regions = []
        for row, region in enumerate(record.regions, start):
            if row in clusters:
                cluster, cosine = clusters[row]
                region = region.model_copy(update={"cluster": cluster})
                nearest.offer(cluster, cosine, os.path.relpath(image, path.parent), region.box_xyxy)
            regions.append(region)
        start += len(record.regions)
        records.append(record.model_copy(update={"image": image, "regions": regions}))
    write_shard(records, path.parent / PARTS, path, form)
    (path.parent / PARTS / path.name).replace(path)


def _save_page(page: Image.Image, target: Path) -> None:
    part = target.with_name(f".{target.name}.part")
    page.save(part, "PNG")
    part.replace(target)
