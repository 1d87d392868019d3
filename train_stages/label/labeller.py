"""What the runner and the engines agree on: images and records go in, labelled records come out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from transformers import AutoConfig

from ...vision_towers.errors import UserError
from ...vision_towers.packaged import model_source
from ...vision_towers.weights_hash import weights_hash
from ..records import Record


@dataclass(frozen=True)
class Labelled:
    """A record with its labels. rows: one for each of its regions, `(R, D)`, kept beside the shard."""

    record: Record
    rows: np.ndarray | None = None


@dataclass(frozen=True)
class PassedOver:
    """A sound image that the engine leaves out; `reason` ("no text") is what such images are counted under."""

    reason: str


@dataclass(frozen=True)
class Workplace:
    """Where an engine's models run. device: of torch; dtype: of weights, None as saved; threads: of other libraries, -1
    for all; source: what regions are to carry as theirs."""

    device: str = "cpu"
    dtype: torch.dtype | None = None
    threads: int = -1
    source: str | None = None


class Labeller(Protocol):
    """An engine with its models open."""

    def label(self, images: Sequence[Image.Image], records: Sequence[Record]) -> list[Labelled | PassedOver]:
        """Upright RGB images and what is known of each, in; as many results, in their order, out."""
        ...


@dataclass(frozen=True)
class Engine:
    """A way to label.

    name: in the command. config: the pydantic dataclass of its settings. open: settings, workplace -> labeller, with
    its models loaded. facts: settings -> what else goes into `labels.json`: models and their revisions. writes: the
    fields of a record that it fills.
    """

    name: str
    config: type
    open: Callable[[Any, Workplace], Labeller]
    facts: Callable[[Any], dict[str, Any]]
    writes: tuple[str, ...]


def source_key(engine: str, facts: dict[str, Any]) -> str:
    """The key of `facts` in `labels.json`: other models or thresholds are another key."""
    text = json.dumps(facts, sort_keys=True, ensure_ascii=False)
    return f"{engine}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def model_facts(name_or_path: str) -> dict[str, Any]:
    """`{"id", "revision"}` of a model: the commit of a hub id, the hash of the weights of a folder.

    Raises:
        UserError: no model there.
    """
    source = model_source(name_or_path)
    if Path(source).is_dir():
        return {"id": name_or_path, "revision": f"sha256:{weights_hash(source)}"}
    try:
        config = AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise no_model(name_or_path, error) from error
    return {"id": name_or_path, "revision": getattr(config, "_commit_hash", None)}


def no_model(name_or_path: str, error: Exception) -> UserError:
    """The sentence for a model that cannot be opened."""
    lines = str(error).splitlines() or [type(error).__name__]
    return UserError(f"no model can be opened at '{name_or_path}': {lines[0].rstrip('.')}.")
