"""Recipes: YAML files of typed dataclasses.

A recipe is read against a dataclass, so that a misspelt key or a wrong type is one sentence before anything is loaded,
and it is written back resolved into the run directory.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

from ..vision_towers.errors import UserError
from .train_config import TrainConfig

__all__ = [
    "TrainConfig",
    "dump_recipe",
    "find_recipe",
    "flatten",
    "load_recipe",
    "packaged_recipes",
    "plain",
    "read_yaml",
]

T = TypeVar("T")
_RECIPES = f"{__package__}.recipes"


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads `1e-3` (no dot) as a string; a learning rate is a number."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(?:\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def load_recipe(source: Path | str | Mapping[str, Any], cls: type[T], overrides: Sequence[str] = ()) -> T:
    """Read a recipe into `cls` (a stdlib or pydantic dataclass, nested as deep as you like).

    Args:
        source: a YAML file, the bare name of a packaged recipe (`train_stages/recipes/NAME.yaml`), or a mapping.
        overrides: `a.b=c` each, `c` read as YAML (`train.steps=100`, `lr.tower=1e-5`, `train.betas=[0.9, 0.95]`).

    Raises:
        UserError: naming the file and the full path of the key: unknown keys (with the nearest known one), missing
            keys, wrong types.
    """
    if isinstance(source, Mapping):
        where, data = "recipe", _copy(source)
    else:
        path = find_recipe(source)
        where, data = path.name, read_yaml(path)
    if data is None:
        data = {}
    if not isinstance(data, dict):
        raise UserError(f"{where}: a recipe is a mapping of blocks, not {_short(data)}.")
    for override in overrides:
        _override(data, override)
    for path, names in _unknown_keys(cls, data, ()):
        raise UserError(f"{where}: unknown key {'.'.join(path)}; {_nearest(path, names)}")
    try:
        return TypeAdapter(cls).validate_python(data)
    except ValidationError as error:
        raise UserError(f"{where}: {_sentence(error)}") from None


def dump_recipe(recipe: object, path: Path | str) -> None:
    """Write a recipe as YAML that `load_recipe` reads back to an equal object (atomic: beside, then renamed)."""
    path = Path(path)
    beside = path.with_name(f".{path.name}.tmp")
    beside.write_text(yaml.safe_dump(plain(recipe), sort_keys=False, allow_unicode=True), encoding="utf-8")
    os.replace(beside, path)


def plain(recipe: object) -> dict[str, Any]:
    """The recipe as nested dicts and lists of YAML scalars."""
    result = TypeAdapter(type(recipe)).dump_python(recipe, mode="json")
    if not isinstance(result, dict):
        raise TypeError(f"a recipe is a dataclass or a mapping, not {type(recipe).__name__}")
    return result


def packaged_recipes() -> list[str]:
    """Names of the recipes that ship with the package."""
    folder = resources.files(_RECIPES)
    return sorted(entry.name[: -len(".yaml")] for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def read_yaml(path: Path) -> Any:
    """One YAML document.

    Raises:
        UserError: the file cannot be read or is not YAML, with the line.
    """
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        raise UserError(f"{path}, line {line}: not valid YAML ({error.problem}).") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read as a recipe ({error}).") from None


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` -> `{"a.b": 1}`; lists stay whole."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """`["recipe.train.steps: 8 there, 16 now", ...]`"""
    old, new = flatten(before), flatten(now)
    absent = "nothing"
    return [
        f"{key}: {old.get(key, absent)} there, {new.get(key, absent)} now"
        for key in dict.fromkeys([*old, *new])
        if old.get(key, absent) != new.get(key, absent)
    ]


def find_recipe(source: Path | str) -> Path:
    """The file of a recipe: a YAML file, or a packaged one by its bare name. Raises UserError when there is none."""
    path = Path(source)
    if path.is_file():
        return path
    names = packaged_recipes()
    if str(source) in names:
        return Path(str(resources.files(_RECIPES).joinpath(f"{source}.yaml")))
    if path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
        raise UserError(f"{source}: no such recipe file.")
    raise UserError(f"{source} is neither a file nor a packaged recipe; packaged are: {', '.join(names) or 'none'}.")


def _copy(tree: Any) -> Any:
    """Overrides must not write into the caller's mapping."""
    return {key: _copy(value) for key, value in tree.items()} if isinstance(tree, Mapping) else tree


def _override(data: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise UserError(f"{override!r} is not an override: write KEY=VALUE, for example train.steps=100.")
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError:
        raise UserError(f"{override!r}: the value is not valid YAML; quote it.") from None
    for depth, key in enumerate(keys[:-1], start=1):
        if data.get(key) is None:  # absent, or an empty block in the file
            data[key] = {}
        data = data[key]
        if not isinstance(data, dict):
            raise UserError(f"{override!r}: {'.'.join(keys[:depth])} is a single value, it has no keys of its own.")
    data[keys[-1]] = value


def _unknown_keys(hint: Any, data: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], list[str]]]:
    """Every (path, known names) in `data` that no field of the dataclasses behind `hint` takes."""
    if isinstance(data, Mapping):
        blocks = list(_dataclasses_of(hint))
        names = list(dict.fromkeys(field.name for block in blocks for field in dataclasses.fields(block)))
        for key, value in data.items():
            if blocks and key not in names:
                yield (*path, str(key)), names
            for block in blocks:
                inner = typing.get_type_hints(block).get(key)
                yield from _unknown_keys(inner, value, (*path, str(key)))
        if not blocks and (arguments := typing.get_args(hint)):
            for key, value in data.items():
                yield from _unknown_keys(arguments[-1], value, (*path, str(key)))
    elif isinstance(data, list) and (arguments := typing.get_args(hint)):
        for index, value in enumerate(data):
            yield from _unknown_keys(arguments[0], value, (*path, str(index)))


def _dataclasses_of(hint: Any) -> Iterator[type]:
    """The dataclasses a value of this type may be (a union may hold several)."""
    origin = typing.get_origin(hint)
    if origin is typing.Annotated:
        yield from _dataclasses_of(typing.get_args(hint)[0])
    elif origin in (typing.Union, types.UnionType):
        for member in typing.get_args(hint):
            yield from _dataclasses_of(member)
    elif isinstance(hint, type) and dataclasses.is_dataclass(hint):
        yield hint


def _nearest(path: tuple[str, ...], names: Sequence[str]) -> str:
    near = difflib.get_close_matches(path[-1], names, n=1, cutoff=0.5)
    if near:
        return f"did you mean {'.'.join((*path[:-1], near[0]))}?"
    return f"known here: {', '.join(names)}."


def _sentence(error: ValidationError) -> str:
    """The first problem of a pydantic error as one sentence that starts with the path of the key."""
    first = error.errors()[0]
    steps = [str(step) for step in first["loc"]]
    path = ".".join(step for step in steps if not step.startswith("<")) or "the recipe"  # <...>: which kind of block
    if first["type"] in ("missing", "missing_argument"):
        return f"{path} is missing; set it in the file or with --set {path}=..."
    if first["type"] == "value_error":  # raised by a __post_init__
        return f"{path}: {str(first.get('ctx', {}).get('error')).rstrip('.')}."
    message = first["msg"].removeprefix("Input ").replace("a valid tuple", "a list")
    return f"{path} {message}, but it is {_short(first['input'])}."


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
