"""A LLaVA checkpoint on disk: its files and the names of its tensors, without reading them."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from ..vision_towers import UserError
from ..vision_towers.packaged import model_source
from .shard_files import Stored, read_header

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
FILES = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]  # of a hub repository, those that are needed
# Names in files -> names in memory. The first three are those of the hub's LLaVAs; the others stand as they are.
IN_MEMORY = (
    (re.compile(r"^language_model\.lm_head\."), "lm_head."),
    (re.compile(r"^(?:model\.)?language_model\.(?:model\.)?"), "model.language_model."),
    (re.compile(r"^(?:model\.)?vision_tower\.(?:vision_model\.)?"), "model.vision_tower."),
    (re.compile(r"^(?:model\.)?multi_modal_projector\."), "model.multi_modal_projector."),
    (re.compile(r"^(?:model\.)?region_projector\."), "model.region_projector."),
    (re.compile(r"^(?:model\.)?image_newline$"), "model.image_newline"),
)
OF_LLAVA = ("vision_tower.", "multi_modal_projector.", "image_newline")


@dataclass(frozen=True)
class Checkpoint:
    """A folder with safetensors."""

    folder: Path

    @cached_property
    def headers(self) -> dict[str, dict[str, Stored]]:
        """File -> name in the file -> where the tensor stands."""
        index = self.folder / INDEX
        if index.is_file():
            files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        else:
            files = [WEIGHTS]
        absent = [name for name in files if not (self.folder / name).is_file()]
        if absent:
            raise UserError(f"{self.folder} lacks {absent[0]}; only whole safetensors checkpoints can be swapped.")
        return {name: read_header(self.folder / name) for name in files}

    @property
    def older_layout(self) -> bool:
        """Whether tensors have the names of the hub's LLaVAs instead of those in memory."""
        return any(name.startswith(("language_model.", "vision_tower.")) for h in self.headers.values() for name in h)

    def named(self, model: PreTrainedModel, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Tensors of the model, by their names in memory, under those they have in this checkpoint's layout: what
        transformers itself would write, and for the newer layout with `model.` in front."""
        written = revert_weight_conversion(model, dict(tensors))
        return written if self.older_layout else {_newer_name(name): tensor for name, tensor in written.items()}


def memory_name(name: str) -> str:
    """The name in memory of a tensor in a LLaVA checkpoint, of either layout."""
    for pattern, memory in IN_MEMORY:
        if pattern.match(name):
            return pattern.sub(memory, name, count=1)
    return name


def _newer_name(name: str) -> str:
    """Only the names of LLaVA's own parts change: inside a tower not all of those in memory can be opened."""
    return f"model.{name}" if name.startswith(OF_LLAVA) else memory_name(name)


def fetch_checkpoint(name_or_path: str | Path) -> Checkpoint:
    """The checkpoint in a folder, or that of a hub id, downloaded.

    Raises:
        UserError: nothing to open there.
    """
    source = model_source(name_or_path)
    if not Path(source).is_dir():
        try:
            source = snapshot_download(source, allow_patterns=FILES)
        except (OSError, HFValidationError, HfHubHTTPError, LocalEntryNotFoundError) as error:
            raise UserError(
                f"no model can be opened at {source!r}: it is no folder here, and the hub says: "
                f"{str(error).splitlines()[0]}"
            ) from error
    if not (Path(source) / "config.json").is_file():
        raise UserError(f"no model can be opened at {source!r}: there is no config.json.")
    return Checkpoint(Path(source))
