"""Where the rows of a built-in task come from: parquet files under a data root, or the Hugging Face hub (or its
cache)."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..vision_towers.errors import UserError
from .official.layout import DATA_ROOT_VARIABLE
from .official.layout import data_root as resolve_root
from .suites import BuiltIn

_PAGE = "docs/suites.md"


@dataclass(frozen=True)
class SuiteData:
    """files: of the split, on this machine; none for rows from the hub."""

    task: BuiltIn
    files: tuple[Path, ...]

    @property
    def source(self) -> dict[str, Any]:
        """What results say about it."""
        if not self.files:
            return {"hub": self.task.repository, "config": self.task.config, "split": self.task.split}
        return {"files": [str(file) for file in self.files], "bytes": sum(file.stat().st_size for file in self.files)}

    def configure(self, config: dict[str, Any]) -> None:
        """Point the configuration of the built-in task at it."""
        if self.files:
            files = {self.task.split: [str(file) for file in self.files]}
            config |= {"dataset_path": "parquet", "dataset_name": None, "dataset_kwargs": {"data_files": files}}
        else:  # as it stands there, but `token: True`, which public data do not need
            config["dataset_kwargs"] = {}


def find_data(tasks: Sequence[BuiltIn], data_root: str | Path | None = None) -> list[SuiteData]:
    """The data of every task, before any model is asked.

    Args:
        data_root: folder with a subfolder for each task; `REGIONTOWER_DATA` when absent. A task whose subfolder is
            there is read from it. Any parquet files whose names begin with the split are taken, wherever they lie in
            it, so a download of the hub's repository will do as it is.
    Raises:
        UserError: one sentence that names everything that is missing, or a file without the columns of its task.
    """
    root = resolve_root(data_root)
    found = [SuiteData(task, _local_files(root / task.name, task) if root else ()) for task in tasks]
    for data in found:
        if data.files:
            _check_columns(data)
    missing = [data.task for data in found if not data.files and not _on_hub(data.task)]
    if missing:
        where = f"in {root}" if root else "on this machine"
        raise UserError(
            f"no data for {', '.join(task.name for task in missing)} {where}, and the hub cannot be reached: "
            f"put the parquet files of {'; '.join(_wanted(task) for task in missing)} into DIR and give "
            f"--data-root DIR or {DATA_ROOT_VARIABLE}=DIR (see {_PAGE})"
        )
    return found


def rows_at_most(rows: Any, limit: int | None, block: int) -> Any:
    """A `datasets.Dataset` of at most `limit` of the rows, spread evenly, in whole blocks of `block` rows (at least
    one), with `image` as pictures."""
    from datasets import Image

    if not isinstance(rows.features["image"], Image):
        rows = rows.cast_column("image", Image())  # files that were not written by `datasets`
    if limit is None or limit >= len(rows):
        return rows
    blocks, wanted = len(rows) // block, max(1, limit // block)
    starts = [number * blocks // wanted * block for number in range(wanted)]
    return rows.select([start + offset for start in starts for offset in range(block)])


def _local_files(folder: Path, task: BuiltIn) -> tuple[Path, ...]:
    """The files of a task's split in its folder; () when there is no such folder."""
    if not folder.is_dir():
        return ()
    part = folder / task.config if task.config and (folder / task.config).is_dir() else folder
    files = sorted(part.rglob("*.parquet"))
    of_split = [file for file in files if file.name.startswith(task.split)]
    if not of_split and len(files) == 1:  # MMStar's is called mmstar.parquet
        of_split = files
    if not of_split:
        raise UserError(f"{part} holds no parquet file whose name begins with {task.split!r} (see {_PAGE})")
    return tuple(of_split)


def _check_columns(data: SuiteData) -> None:
    import pyarrow.parquet

    for file in data.files:
        try:
            names = set(pyarrow.parquet.read_schema(file).names)
        except (OSError, pyarrow.ArrowException) as error:
            raise UserError(f"{file} is not a parquet file: {str(error).splitlines()[0]}") from error
        if absent := [name for name in data.task.columns if name not in names]:
            raise UserError(f"{file} lacks the columns {', '.join(absent)}, which {data.task.name} reads (see {_PAGE})")
    if data.task.rows_in_a_block > 1:
        _check_blocks(data)


def _check_blocks(data: SuiteData) -> None:
    """MME scores pairs; a lone question would end the run once every answer is in."""
    import pyarrow.parquet

    block = data.task.rows_in_a_block
    ids: list[Any] = []
    for file in data.files:
        ids += pyarrow.parquet.read_table(file, columns=["question_id"])["question_id"].to_pylist()
    blocks = [ids[start : start + block] for start in range(0, len(ids), block)]
    if broken := [one for one in blocks if len(one) != block or len(set(one)) != 1]:
        raise UserError(
            f"{data.files[0].parent}: {data.task.name} scores {block} rows of one question_id together, one after the "
            f"other; {broken[0][0]!r} does not stand so"
        )


def _on_hub(task: BuiltIn) -> bool:
    """Whether `datasets` can open it, from its cache or the network."""
    from datasets import load_dataset_builder
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        load_dataset_builder(task.repository, task.config)
    except (OSError, ValueError, DatasetNotFoundError, HfHubHTTPError, OfflineModeIsEnabled):
        return False
    return True


def _wanted(task: BuiltIn) -> str:
    part = f"/{task.config}" if task.config else ""
    return f"{task.repository}{part} ({task.split}) -> DIR/{task.name}"
