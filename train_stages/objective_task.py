"""A stage 0 ready to run, and what the tasks of all objectives do alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from ..vision_towers import tower_image_processor
from ..vision_towers.errors import UserError
from .pretrain_items import ItemMaker
from .pretrain_recipe import PretrainModel
from .region_labels import ObjectClasses


@dataclass(frozen=True)
class Task:
    """A stage ready to run: the model, what it makes of an image, and words for the user about the data.

    about: what is known of the images that take part -> how many of what there are, after "12 of 14 images have ".
    regions: the part of the model that reads regions.
    labels: the classes and the like that were read from the records; may be empty.
    """

    objective: nn.Module
    regions: PreTrainedModel
    items: ItemMaker
    save: Callable[[Path], None]
    about: Callable[[Sequence[Any]], str]
    labels: str = ""
    tower: str = "tower"  # name of the native or RICE tower in the objective; all else is heads
    classes: ObjectClasses | None = None
    centres: Callable[[], dict[str, Tensor]] | None = None  # of these classes, put together by all processes
    before_save: Callable[[], None] = lambda: None


def parent_run(model: PretrainModel) -> Path:
    """The folder of the finished run whose heads are kept."""
    if model.tower is None or not Path(model.tower).is_dir():
        raise UserError("model.keep_heads goes on with the heads of a finished run: set model.tower to its folder.")
    return Path(model.tower)


def save_tower(tower: PreTrainedModel, folder: Path) -> None:
    """The tower with an image processor."""
    tower.save_pretrained(folder)
    tower_image_processor(tower.config).save_pretrained(folder)
