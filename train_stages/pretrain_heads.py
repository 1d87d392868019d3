"""What stage 0 trains beside the tower, in files: class centres (RICE), or a text tower and projections (CLIP)."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerBase

from ..vision_towers.errors import UserError
from .clip_objective import ClipObjective
from .engine.manifest import read_stage
from .engine.shards import whole_table
from .region_labels import ObjectClasses
from .rice_objective import RiceObjective

CENTRES_FILE = "centres.safetensors"
CLASSES_FILE = "labels.json"
TEXT_TOWER_FOLDER = "text_tower"
CLIP_HEADS_FILE = "clip_heads.safetensors"


def whole_centres(objective: RiceObjective) -> dict[str, torch.Tensor]:
    """The tables of centres, `object` and `ocr`, put together from every process (which all have to call this)."""
    return {
        name: whole_table(table, objective.class_shards[f"{name}_centres"]).contiguous()
        for name, table in _centres(objective).items()
    }


def save_centres(centres: dict[str, torch.Tensor], classes: ObjectClasses, folder: Path) -> None:
    """`centres.safetensors` (of `whole_centres`) and the names of the object classes."""
    save_file(centres, folder / CENTRES_FILE)
    labels = {"object_labels": classes.source, "stuff": classes.stuff, "names": classes.names}
    (folder / CLASSES_FILE).write_text(json.dumps(labels, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def load_centres(
    objective: RiceObjective, classes: ObjectClasses, tokenizer: PreTrainedTokenizerBase | None, folder: Path
) -> None:
    """Take over the centres of a finished run.

    Raises:
        UserError: there are none, or they are those of other classes or of another tokenizer.
    """
    path = _file(folder / CENTRES_FILE)
    check_tokenizer(tokenizer, folder)
    names = json.loads((folder / CLASSES_FILE).read_text(encoding="utf-8"))["names"]
    if names != classes.names:
        raise UserError(f"the centres in {folder} are those of other object classes; set model.keep_heads=false.")
    with safe_open(path, "pt") as file, torch.no_grad():
        for name, table in _centres(objective).items():
            shard = objective.class_shards[f"{name}_centres"]
            shape = tuple(file.get_slice(name).get_shape()) if name in file.keys() else None  # noqa: SIM118 - no dict
            _check_shape(name, shape, (shard.total, table.shape[1]), folder)
            table.copy_(file.get_slice(name)[shard.first : shard.first + shard.size])


def save_text_side(objective: ClipObjective, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """`text_tower/` with its tokenizer, and `clip_heads.safetensors`."""
    objective.text_tower.save_pretrained(folder / TEXT_TOWER_FOLDER)
    tokenizer.save_pretrained(folder / TEXT_TOWER_FOLDER)
    held = {name: value.detach().cpu().contiguous() for name, value in _clip_heads(objective).items()}
    save_file(held, folder / CLIP_HEADS_FILE)


def load_text_side(objective: ClipObjective, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Take over text tower and projections of a finished run.

    Raises:
        UserError: there are none, or they have other sizes or read another tokenizer.
    """
    saved = load_file(_file(folder / CLIP_HEADS_FILE))
    check_tokenizer(tokenizer, folder)
    text_tower = CLIPTextModel.from_pretrained(folder / TEXT_TOWER_FOLDER, dtype=torch.float32)
    # Shapes do not tell the number of heads, nor of layers that the recipe has no place for.
    check_settings("model.clip", text_sizes(objective.text_tower.config), text_sizes(text_tower.config), folder)
    _copy(text_tower.state_dict(), objective.text_tower.state_dict(), folder)
    _copy(saved, _clip_heads(objective), folder)


def vocabulary_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 (hex) of the tokens and their numbers."""
    return hashlib.sha256(json.dumps(tokenizer.get_vocab(), sort_keys=True).encode()).hexdigest()


def reads_otherwise(run: Path, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the run in `run` noted that it read texts by another vocabulary than `tokenizer`'s. One without a
    stage.json, or without a note in it, tells nothing."""
    noted = ((read_stage(run) or {}).get("data") or {}).get("tokenizer")
    return noted is not None and noted != vocabulary_hash(tokenizer)


def check_tokenizer(tokenizer: PreTrainedTokenizerBase | None, folder: Path) -> None:
    """Raises UserError when heads in `folder` read texts by another vocabulary; without a tokenizer no text is read."""
    if tokenizer is not None and reads_otherwise(folder, tokenizer):
        raise UserError(
            f"the heads in {folder} were trained with another vocabulary than data.tokenizer has: name the tokenizer "
            "of that run, or set model.keep_heads=false."
        )


def text_sizes(config: CLIPTextConfig) -> dict[str, int]:
    """The sizes of a text tower, named as in `ClipConfig`."""
    return {
        "text_hidden": config.hidden_size,
        "text_layers": config.num_hidden_layers,
        "text_heads": config.num_attention_heads,
        "max_tokens": config.max_position_embeddings,
    }


def check_settings(block: str, wanted: Mapping[str, Any], there: Mapping[str, Any], source: Path | str) -> None:
    """Raises UserError for the first key of `there`, what a model was made with, that is another in `wanted`, what the
    recipe's `block` says."""
    for key, value in there.items():
        if wanted[key] != value:
            asked, made = (str(v).lower() if isinstance(v, bool) else v for v in (wanted[key], value))
            raise UserError(
                f"{block}.{key} comes to {asked}, and {source} was made with {made}, which is kept; set "
                f"{block}.{key}={made}."
            )


def _centres(objective: RiceObjective) -> dict[str, torch.Tensor]:
    tables = {"object": objective.object_centres, "ocr": objective.ocr_centres}
    return {name: table for name, table in tables.items() if table is not None}


def _clip_heads(objective: ClipObjective) -> dict[str, torch.Tensor]:
    return {
        "image_projection": objective.image_projection.weight,
        "text_projection": objective.text_projection.weight,
        "logit_scale": objective.logit_scale,
    }


def _file(path: Path) -> Path:
    if not path.is_file():
        raise UserError(f"{path} does not exist: the run is of another objective; set model.keep_heads=false.")
    return path


@torch.no_grad()
def _copy(saved: dict[str, torch.Tensor], into: dict[str, torch.Tensor], folder: Path) -> None:
    for name, tensor in into.items():
        _check_shape(name, tuple(saved[name].shape) if name in saved else None, tuple(tensor.shape), folder)
        tensor.copy_(saved[name])


def _check_shape(name: str, there: tuple | None, wanted: tuple, folder: Path) -> None:
    if there != wanted:
        raise UserError(
            f"{name} in {folder} is {there or 'absent'}, and the recipe wants {wanted}; give the same sizes or "
            "set model.keep_heads=false."
        )
