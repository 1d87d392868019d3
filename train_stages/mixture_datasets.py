"""Sources of a mixture that Hugging Face's `datasets` opens: parquet, arrow and JSON files, saved folders, hub ids."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from ..vision_towers.errors import UserError
from .bad_records import BadRecord, refuse_too_many_bad
from .chat_samples import Example, Unusable
from .importers.fields import one_sentence
from .mixture_recipe import MixtureSource
from .mixture_sources import Examples, Lazy, annotated_example
from .picture_file import PictureFile
from .records import Record

_FILES = {".parquet": "parquet", ".arrow": "arrow", ".json": "json", ".jsonl": "json"}
_SAVED = ("state.json", "dataset_dict.json")  # by `save_to_disk`
_ROLES = {"user": "human", "assistant": "gpt", "system": "system"}


def dataset_rows(source: MixtureSource, name: str) -> Examples:
    """The rows of a data set, in any order. A row has `image` (an encoded image, or a file name) or none, and either
    `conversations` (LLaVA), `messages` (role, content) or the fields of a region record.

    Raises:
        UserError: `datasets` is not installed, or there is no such data set.
    """
    return Lazy(_open(source, name, streaming=False), partial(_read_row, source, Path(name).name))


def _read_row(source: MixtureSource, file: str, index: int, row: Mapping[str, Any]) -> Example:
    return row_example(source, f"{file}, row {index + 1}", row)


def streamed_rows(source: MixtureSource, seed: int) -> Iterator[Example]:
    """The same, round after round, shuffled within `source.buffer` rows; bad rows are passed over, too many of them
    raise UserError."""
    bad: list[BadRecord] = []
    total = 0
    streams = [_open(source, name, streaming=True).shuffle(seed, buffer_size=source.buffer) for name in source.names()]
    number = 0
    while True:
        before = total
        for name, stream in zip(source.names(), streams, strict=True):
            stream.set_epoch(number)
            for row in stream:
                total += 1
                try:
                    yield row_example(source, f"{Path(name).name}, row {total}", row)
                except Unusable as error:
                    bad.append(BadRecord(error.name, error.reason))
                    refuse_too_many_bad(Path(name), bad, total)
        if total == before:
            raise UserError(f"{source.names()[0]}: there is no row in it.")
        number += 1


def row_example(source: MixtureSource, name: str, row: Mapping[str, Any]) -> Example:
    """Raises Unusable for a row that has neither a conversation nor a region record."""
    try:
        image = row.get("image")
        if isinstance(image, list):  # columns of several images are common, with one in them
            if len(image) > 1:
                raise ValueError(f"it has {len(image)} images; one is taken")
            image = image[0] if image else None
        picture = None
        if isinstance(image, Mapping):
            picture = PictureFile(name, None if image.get("path") is None else Path(image["path"]), data=image["bytes"])
        fields = {key: value for key, value in row.items() if value is not None and key not in ("image", "images")}
        if isinstance(image, str):
            fields["image"] = image
        if "messages" in fields:
            fields["conversations"] = [_turn(message) for message in fields.pop("messages")]
        if "conversations" not in fields:
            fields = {key: value for key, value in fields.items() if key in Record.model_fields}
        elif picture is not None and not any("<image>" in turn["value"] for turn in fields["conversations"]):
            talk = [dict(turn) for turn in fields["conversations"]]
            first = next(turn for turn in talk if turn["from"] != "system")
            first["value"] = f"<image>\n{first['value']}"
            fields["conversations"] = talk
        return annotated_example(source, name, fields, Path(source.root or "."), picture)
    except (ValueError, KeyError, TypeError, StopIteration) as error:
        raise Unusable("bad", name, one_sentence(error)) from error


def _turn(message: Mapping[str, Any]) -> dict[str, str]:
    content = message["content"]
    if not isinstance(content, str):
        content = "".join("<image>" if part["type"] == "image" else str(part.get("text") or "") for part in content)
    return {"from": _ROLES[message["role"]], "value": content}


def _open(source: MixtureSource, name: str, streaming: bool) -> Any:
    try:
        import datasets
    except ImportError:
        raise UserError(
            "Data sets are opened by datasets, which is not installed; pip install 'regiontower[stream]'."
        ) from None
    path = Path(source.root, name) if source.root else Path(name)
    try:
        if any((path / file).is_file() for file in _SAVED):
            found: Any = datasets.load_from_disk(str(path))
            found = found[source.split] if isinstance(found, datasets.DatasetDict) else found
            found = found.to_iterable_dataset() if streaming else found
        elif path.suffix in _FILES:
            files = {"train": str(path)}
            found = datasets.load_dataset(_FILES[path.suffix], data_files=files, split="train", streaming=streaming)
        else:
            found = datasets.load_dataset(str(path), split=source.split, streaming=streaming)
    except Exception as error:  # it raises all sorts of things
        raise UserError(f"{name}: no data set can be opened there ({one_sentence(error).rstrip('.')}).") from error
    if found.features and "images" in found.features and "image" not in found.features:
        found = found.rename_column("images", "image")
    return _undecoded(found, datasets)


def _undecoded(found: Any, datasets: Any) -> Any:
    """With images as bytes: they are decoded when their sample is needed."""
    kind = (found.features or {}).get("image")
    if isinstance(kind, datasets.Image):
        return found.cast_column("image", datasets.Image(decode=False))
    inner = getattr(kind, "feature", None)
    if isinstance(inner, datasets.Image):
        return found.cast_column("image", type(kind)(datasets.Image(decode=False)))  # pyright: ignore[reportCallIssue]
    return found
