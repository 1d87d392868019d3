"""The official tasks by name: which files make their rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ...vision_towers.errors import UserError
from ..task_kinds import PREFIX
from ..task_rows import TaskRow, even_sample
from .ferret_bench import ferret_bench_rows
from .flickr30k import flickr30k_rows
from .layout import COCO_PAGE, FERRET_PAGE, FLICKR_IMAGES_PAGE, FLICKR_PAGE, REFER_PAGE, need_images
from .refcoco import refcoco_rows
from .reflvis import reflvis_rows


@dataclass(frozen=True)
class OfficialSet:
    """name: of the folder under the data root. rows: from the root, the rows of a task. page: who gives out the files;
    images_page: who gives out the pictures. tasks: task name -> the argument that `rows` takes for it."""

    name: str
    rows: Callable[[Path, str], list[TaskRow]]
    page: str
    images_page: str
    tasks: dict[str, str]


def _named(prefix: str, *parts: str) -> dict[str, str]:
    return {f"{PREFIX}{prefix}_{part}": part for part in parts}


OFFICIAL_SETS: tuple[OfficialSet, ...] = (
    *(
        OfficialSet(
            name,
            lambda root, split, name=name: refcoco_rows(root, name, split),
            REFER_PAGE,
            COCO_PAGE,
            _named(name, *splits),
        )
        for name, splits in {
            "refcoco": ("val", "testA", "testB"),
            "refcoco+": ("val", "testA", "testB"),
            "refcocog": ("val", "test"),
        }.items()
    ),
    OfficialSet("flickr30k", flickr30k_rows, FLICKR_PAGE, FLICKR_IMAGES_PAGE, _named("flickr30k", "val", "test")),
    OfficialSet("reflvis", reflvis_rows, FERRET_PAGE, COCO_PAGE, _named("reflvis", "box", "point", "shape")),
    OfficialSet(
        "ferret_bench",
        ferret_bench_rows,
        FERRET_PAGE,
        COCO_PAGE,
        _named("ferret_bench", "refer_desc", "refer_reason", "ground_conv"),
    ),
)


def official_set_of(task: str) -> OfficialSet:
    """The set that a task of `task_kinds.OFFICIAL_TASKS` belongs to."""
    return next(found for found in OFFICIAL_SETS if task in found.tasks)


def official_rows(root: Path | None, task: str, limit: int | None = None) -> list[TaskRow]:
    """The rows of an official task, counted against the published numbers before any limit.

    Raises:
        Absent: the benchmark's folder is not there.
        UserError: some of its files are missing or not the official ones; each sentence names the page to get them
        from.
    """
    found = official_set_of(task)
    if root is None:
        raise UserError(f"{task} needs --data-root DIR with DIR/{found.name}/; its files are at {found.page}.")
    rows = found.rows(root, found.tasks[task])
    rows = rows if limit is None else even_sample(rows, limit)
    need_images(rows, found.images_page)
    return rows
