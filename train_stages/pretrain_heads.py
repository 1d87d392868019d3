"""What stage 0 trains beside the tower, in files: class centres (RICE), or a text tower and projections (CLIP)."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, PreTrainedTokenizerBase

from ..vision_towers.errors import UserError
from .clip_objective import ClipObjective
from .region_labels import ObjectClasses
from .rice_objective import RiceObjective

CENTRES_FILE = "centres.safetensors"
CLASSES_FILE = "labels.json"
TEXT_TOWER_FOLDER = "text_tower"
CLIP_HEADS_FILE = "clip_heads.safetensors"


def save_centres(objective: RiceObjective, classes: ObjectClasses, folder: Path) -> None:
    """`centres.safetensors` and the names of the object classes."""
    held = {name: table.detach().cpu().contiguous() for name, table in _centres(objective).items()}
    save_file(held, folder / CENTRES_FILE)
    labels = {"object_labels": classes.source, "stuff": classes.stuff, "names": classes.names}
    (folder / CLASSES_FILE).write_text(json.dumps(labels, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def load_centres(objective: RiceObjective, classes: ObjectClasses, folder: Path) -> None:
    """Take over the centres of a finished run.

    Raises:
        UserError: there are none, or they are those of other classes.
    """
    saved = _tensors(folder / CENTRES_FILE)
    names = json.loads((folder / CLASSES_FILE).read_text(encoding="utf-8"))["names"]
    if names != classes.names:
        raise UserError(f"the centres in {folder} are those of other object classes; set model.keep_heads=false.")
    _copy(saved, _centres(objective), folder)


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
    saved = _tensors(folder / CLIP_HEADS_FILE)
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


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    if not path.is_file():
        raise UserError(f"{path} does not exist: the run is of another objective; set model.keep_heads=false.")
    return load_file(path)


@torch.no_grad()
def _copy(saved: dict[str, torch.Tensor], into: dict[str, torch.Tensor], folder: Path) -> None:
    for name, tensor in into.items():
        if name not in saved or saved[name].shape != tensor.shape:
            there = tuple(saved[name].shape) if name in saved else "absent"
            raise UserError(
                f"{name} in {folder} is {there}, and the recipe wants {tuple(tensor.shape)}; give the same sizes or "
                "set model.keep_heads=false."
            )
        tensor.copy_(saved[name])
