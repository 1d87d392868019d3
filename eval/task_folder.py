"""Rows + task templates -> a folder that lmms-eval's `--include_path` takes."""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from ..train_stages.record_io import read_records
from ..vision_towers.errors import UserError
from .conventions import OWN, Convention, bind
from .task_kinds import ALL_TASKS, PREFIX
from .task_rows import TaskRow, task_rows

EVALUATION_SCENES = 100
_TEMPLATES = Path(__file__).parent / "lmms_tasks"


def task_folder(
    data: str | Path | None = None,
    *,
    format: str = "records",
    image_root: str | Path | None = None,
    limit: int | None = None,
    tasks: Sequence[str] | None = None,
    convention: Convention | None = None,
) -> Path:
    """The folder of our tasks bound to rows of `data`, made in the cache unless it is there.

    The folder's name is the hash of the rows, so it is never stale, and image and data paths in it are absolute. A task
    without a row (reading where no region has a transcript) is left out.

    Args:
        data: a file of region records; None for 100 generated scenes of the evaluation seeds, made once.
        format: importer of `data` (`train_stages.record_io.read_records`).
        image_root: folder that relative image paths start from, if not the file's own.
        limit: at most so many rows a task (`task_rows.even_sample`).
        tasks: names out of `task_kinds.RECORD_TASKS`; None for the four of `TASKS`.
        convention: how a model that is not ours is asked (`conventions.CONVENTIONS`).

    Raises:
        UserError: unreadable data, no rows for any task, an unknown task, or lmms-eval is not installed.
    """
    require_lmms_eval()
    path = evaluation_scenes() if data is None else Path(data)
    records = read_records(path, format=format, image_root=image_root, check_images=True)
    rows = rows_or_error(task_rows(records, tasks=tasks, limit=limit), path)
    if convention is not None:
        rows = {name: [bind(name, row, convention) for row in found] for name, found in rows.items()}
    return bind_tasks(rows, cache_folder() / "tasks", convention=convention)


def bind_tasks(rows: Mapping[str, Sequence[TaskRow]], parent: Path, *, convention: Convention | None = None) -> Path:
    """Write the rows and their YAMLs into `parent/<hash>` and return that folder; tasks without rows are left out.

    convention: how the questions of `rows` are put (`conventions.bind`); None for our own model class.
    """
    asked_in = OWN if convention is None else convention.name
    documents = {
        name: [asdict(row) | {"convention": asked_in} for row in found] for name, found in rows.items() if found
    }
    files = {name: _TEMPLATES / f"{PREFIX}{ALL_TASKS[name]}.yaml" for name in documents}
    templates = {name: file.read_text(encoding="utf-8") for name, file in files.items()}
    content = json.dumps([str(_TEMPLATES), templates, documents], sort_keys=True)
    folder = parent.absolute() / hashlib.sha256(content.encode()).hexdigest()[:16]

    def write(target: Path) -> None:
        for name, found in documents.items():
            with _no_bars():
                _dataset(found).save_to_disk(str(target / name))
            bound = {"include": str(files[name]), "task": name, "dataset_path": str(folder / name)}
            (target / f"{name}.yaml").write_text(yaml.safe_dump(bound, allow_unicode=True), encoding="utf-8")

    return _made_once(folder, write)


def rows_or_error(rows: Mapping[str, list[TaskRow]], data: str | Path) -> Mapping[str, list[TaskRow]]:
    """The rows as they are; a UserError when no task has any."""
    if not any(rows.values()):
        raise UserError(
            f"{data} has no row for {', '.join(rows)}: grounding and referring need `texts` that are true of one "
            "region, reading needs `ocr`"
        )
    return rows


def evaluation_scenes(count: int = EVALUATION_SCENES) -> Path:
    """`records.jsonl` of `count` scenes (preset `default`, seeds kept for evaluation), made once in the cache."""
    from ..train_stages.scenes import EVAL_SEED_START, generate_scene, write_scenes

    # The first scene stands for the generator: another version of it gets another folder.
    first = generate_scene(EVAL_SEED_START)
    version = hashlib.sha256(first.image.tobytes() + first.record.model_dump_json().encode()).hexdigest()[:12]
    folder = cache_folder() / "scenes" / f"default-{EVAL_SEED_START}-{count}-{version}"
    _made_once(folder, lambda target: write_scenes(target, count, EVAL_SEED_START))
    return folder / "records.jsonl"


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/regiontower`, by default `~/.cache/regiontower`."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(home) if home else Path.home() / ".cache").absolute() / "regiontower"


def require_lmms_eval() -> None:
    """A UserError with the command that installs it, unless lmms-eval is there."""
    try:
        import lmms_eval  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"evaluation runs through lmms-eval, which cannot be imported ({error}): pip install 'regiontower[eval]'"
        ) from error


def _dataset(documents: Sequence[dict]):
    """A DatasetDict with the split `test`. Its types are given: guessing ones turn transcripts such as 2018-04-16 into
    dates and empty lists into nulls."""
    from datasets import Dataset, DatasetDict, Features, List, Value

    box = List(Value("float64"))
    types: dict[str, Any] = dict.fromkeys(("width", "height", "region_index", "distractors"), Value("int64"))
    types |= {"target_xyxy": box, "point_xy": box, "prompt_boxes": List(box), "targets": List(box)}
    types |= {"answers": List(Value("string")), "choices": List(Value("string"))}
    features = Features({name: types.get(name, Value("string")) for name in documents[0]})
    return DatasetDict({"test": Dataset.from_list(list(documents), features=features)})


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    from datasets import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def _made_once(folder: Path, write: Callable[[Path], object]) -> Path:
    """`folder`, filled by `write(path)` beside it and then renamed: a reader never sees half of it."""
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        write(draft)
        try:
            draft.rename(folder)
        except OSError:
            if not folder.is_dir():  # another process was faster: its folder is as good
                raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder
