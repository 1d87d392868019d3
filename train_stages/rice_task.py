"""RICE as a task of stage 0: a tower and class centres, on labelled regions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .objective_task import Task, parent_run, save_tower
from .pretrain_data import LabelledRegions, RegionItems
from .pretrain_heads import load_centres, save_centres, whole_centres
from .pretrain_recipe import PretrainRecipe
from .records import Record
from .region_labels import ObjectClasses, TextClasses
from .rice_objective import RiceObjective


def rice_task(
    recipe: PretrainRecipe,
    tower: PreTrainedModel,
    records: Iterable[Record],
    tokenizer: PreTrainedTokenizerBase | None,
) -> Task:
    """The tower beside class centres that are new, or kept as `model.keep_heads` says. Without a tokenizer OCR regions
    are left out.

    Raises:
        UserError: no region has an object label, a tower without a region readout, or centres that cannot be kept
            (`load_centres`).
    """
    classes = ObjectClasses.of(records, recipe.data.object_labels, recipe.data.stuff)
    texts = TextClasses(tokenizer) if tokenizer is not None else None
    items = RegionItems(classes, texts, recipe.data.regions_per_image, recipe.data.augment, recipe.data.view)
    text_classes = len(texts) if texts else 0
    objective = RiceObjective(tower, len(classes), text_classes, recipe.model.rice, recipe.train.seed)
    if recipe.model.keep_heads:
        load_centres(objective, classes, tokenizer, parent_run(recipe.model))

    centres: dict[str, torch.Tensor] = {}

    def save(folder: Path) -> None:
        save_tower(objective.tower, folder)
        save_centres(centres, classes, folder)

    labels = f"{len(classes)} object classes; "
    labels += f"{len(texts)} token classes" if texts else "OCR regions are left out (data.tokenizer is not set)"
    return Task(
        objective,
        objective.tower,
        items,
        save,
        _about,
        labels,
        classes=classes,
        centres=lambda: whole_centres(objective),
        before_save=lambda: centres.update(whole_centres(objective)),
    )


def _about(known: Sequence[LabelledRegions]) -> str:
    regions = sum(len(image.boxes) for image in known)
    with_text = sum(bool(ids) for image in known for ids in image.texts)
    return f"labelled regions, {regions} in all, {with_text} with text"
