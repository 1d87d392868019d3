"""Sources of a mixture: `Example`s by number, each read when it is asked for."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from ..vision_towers.errors import UserError
from .chat_samples import Example, Unusable
from .conversations import check_mix
from .importers.fields import json_list_or_lines, one_sentence
from .importers.llava import llava_sample
from .json_lines import JsonLines
from .mixture_recipe import CONVERSATIONS, DATASETS, MixtureSource
from .picture_file import PictureFile
from .record_source import WEBDATASET
from .records import Record
from .shard_index import ShardSample, index_shards

_MARK = "<image>"  # of LLaVA's format, whatever a model's own image token is


class Examples(Protocol):
    """What can be drawn from in any order. Raises Unusable for one that is broken."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


@dataclass(frozen=True)
class Lazy:
    """items: anything with a length and an index. read: (index, item) -> its example; other processes get it, so it is
    no function inside a function."""

    items: Any
    read: Callable[[int, Any], Example]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Example:
        return self.read(index, self.items[index])


@dataclass(frozen=True)
class Joined:
    """Several files as one."""

    parts: Sequence[Examples]

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)

    def __getitem__(self, index: int) -> Example:
        for part in self.parts:
            if index < len(part):
                return part[index]
            index -= len(part)
        raise IndexError(index)


def open_source(source: MixtureSource) -> Examples:
    """The examples of a source that is not streamed.

    Raises:
        UserError: a file that cannot be read, or a bad mix.
    """
    check_mix(source.mix)
    if source.format == DATASETS:
        from .mixture_datasets import dataset_rows

        return Joined([dataset_rows(source, name) for name in source.names()])
    if source.format == WEBDATASET:
        return _shards(source)
    if source.format == CONVERSATIONS:
        return Joined([_conversations(source, path) for path in source.paths()])
    if source.format == "records":
        return Joined([_records(source, path) for path in source.paths()])
    found = source.read()  # an importer reads the whole file
    return Lazy(found.records, partial(_read_imported, source, found.root))


def _read_imported(source: MixtureSource, root: Path, index: int, record: Record) -> Example:
    return record_example(source, record, root)


def record_example(source: MixtureSource, record: Record, root: Path, picture: PictureFile | None = None) -> Example:
    """The example of a region record whose image lies under `root`, unless its `picture` is given."""
    if picture is None:
        picture = PictureFile(record.image, root / record.image, record=record)
    return Example(record.image, picture, record, source.mix, source.turns)


def annotated_example(
    source: MixtureSource, name: str, item: Mapping[str, Any], root: Path, picture: PictureFile | None
) -> Example:
    """The example of an object that is a LLaVA conversation (it has `conversations`) or else a region record.

    picture: the image itself, where it comes with the object instead of lying under `root`.
    Raises ValueError for a bad object.
    """
    if "conversations" not in item:
        record = Record.model_validate({**item, "image": name} if picture is not None else dict(item))
        return record_example(source, record, root, None if picture is None else with_record(picture, record))
    if picture is not None:
        item = {**item, "image": name}
    found = llava_sample(name, item, root)
    if picture is None and found.image is not None:
        picture = PictureFile(str(item["image"]), found.image)
    talk = [text.replace(_MARK, "").strip() if role == "user" else text for role, text in found.turns]
    system = talk.pop(0) if found.turns[0][0] == "system" else None
    return Example(name, picture, turns=tuple(zip(talk[::2], talk[1::2], strict=True)), system=system)


def with_record(picture: PictureFile, record: Record) -> PictureFile:
    """The picture, which must have the record's size."""
    return PictureFile(picture.name, picture.path, picture.start, picture.length, picture.data, record)


def _records(source: MixtureSource, path: Path) -> Examples:
    return Lazy(JsonLines(path), partial(_read_record, source, path))


def _read_record(source: MixtureSource, path: Path, index: int, line: bytes) -> Example:
    try:
        return record_example(source, Record.model_validate_json(line), _root(source, path))
    except ValueError as error:
        raise Unusable("bad", f"{path.name}, record {index + 1}", one_sentence(error)) from error


def _conversations(source: MixtureSource, path: Path) -> Examples:
    read = partial(_read_conversation, source, path)
    if _first_character(path) == b"[":  # a list has to be read whole
        items = [item for _, item in json_list_or_lines(path)]
        if not items:
            raise UserError(f"{path}: there is no conversation in it; give a file with at least one.")
        return Lazy(items, read)
    return Lazy(JsonLines(path), read)


def _read_conversation(source: MixtureSource, path: Path, index: int, item: Any) -> Example:
    name = f"{path.name}, conversation {index + 1}"
    try:
        found = json.loads(item) if isinstance(item, bytes) else item
        if not isinstance(found, dict):
            raise ValueError(str(found) if isinstance(found, ValueError) else "it is no JSON object")
        if "conversations" not in found:
            raise ValueError("'conversations' is missing")
        return annotated_example(source, name, found, _root(source, path), None)
    except (ValueError, RecursionError) as error:
        raise Unusable("bad", name, one_sentence(error)) from error


def _shards(source: MixtureSource) -> Examples:
    for name in source.names():
        if "://" in name or not name.endswith(".tar"):
            raise UserError(f"{name}: only .tar files on a local disk can be read in any order; set stream: true.")
    return Lazy(index_shards(source.paths()), partial(_read_shard_sample, source))


def _read_shard_sample(source: MixtureSource, index: int, sample: ShardSample) -> Example:
    name = f"{sample.shard.name}: {sample.key}"
    try:
        found = json.loads(sample.annotation_bytes())
        if not isinstance(found, dict):
            raise ValueError("its annotation is no JSON object")
        picture = None
        if sample.image is not None:
            picture = PictureFile(f"{sample.key}.{sample.suffix}", sample.shard, *sample.image)
        elif "conversations" not in found:
            raise ValueError("it has no image")
        return annotated_example(source, name, found, sample.shard.parent, picture)
    except (ValueError, OSError) as error:
        raise Unusable("bad", name, one_sentence(error)) from error


def _root(source: MixtureSource, path: Path) -> Path:
    return Path(source.root) if source.root else path.parent


def _first_character(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return next((line.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] for line in file if line.strip()), b"")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path.") from None


def streamed_examples(source: MixtureSource, seed: int) -> Iterator[Example]:
    """The examples of a source in an order of their own, round after round; broken ones are passed over.

    Raises:
        UserError: more than max(5, 1 %) of them are bad.
    """
    check_mix(source.mix)
    if source.format == DATASETS:
        from .mixture_datasets import streamed_rows

        yield from streamed_rows(source, seed)
        return
    if source.format == CONVERSATIONS:
        raise UserError("LLaVA's JSON cannot be streamed; leave stream out: a JSONL is read line by line as it is.")
    from .streaming import RecordStream

    for image in RecordStream(source, seed, source.buffer).rounds(0, 1):
        picture = None
        if image.data is not None:
            picture = PictureFile(image.record.image, data=image.data, record=image.record)
        yield record_example(source, image.record, image.root, picture)
