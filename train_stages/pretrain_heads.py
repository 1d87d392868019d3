"""What stage 0 trains beside the tower, in files: class centres (RICE), or a text tower and projections (CLIP)."""

import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, PreTrainedTokenizerBase

from ..vision_towers.errors import UserError
from .clip_objective import ClipObjective
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


def load_centres(objective: RiceObjective, classes: ObjectClasses, folder: Path) -> None:
    """Take over the centres of a finished run.

    Raises:
        UserError: there are none, or they are those of other classes.
    """
    path = _file(folder / CENTRES_FILE)
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


def load_text_side(objective: ClipObjective, folder: Path) -> None:
    """Take over text tower and projections of a finished run.

    Raises:
        UserError: there are none, or they have other sizes.
    """
    saved = load_file(_file(folder / CLIP_HEADS_FILE))
    text_tower = CLIPTextModel.from_pretrained(folder / TEXT_TOWER_FOLDER, dtype=torch.float32)
    _copy(text_tower.state_dict(), objective.text_tower.state_dict(), folder)
    _copy(saved, _clip_heads(objective), folder)


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
