"""RICE as a task of stage 0: a tower and class centres, on labelled regions."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .objective_task import Task, parent_run, save_tower
from .pixels import PixelCache
from .pretrain_data import RegionDataset, collate_regions
from .pretrain_heads import load_centres, save_centres, whole_centres
from .pretrain_recipe import PretrainRecipe
from .region_labels import ObjectClasses, TextClasses
from .rice_objective import RiceObjective


def rice_task(
    recipe: PretrainRecipe, tower: PreTrainedModel, cache: PixelCache, tokenizer: PreTrainedTokenizerBase | None
) -> Task:
    """The task. Without a tokenizer OCR regions are left out."""
    classes = ObjectClasses.of(cache.records, recipe.data.object_labels, recipe.data.stuff)
    texts = TextClasses(tokenizer) if tokenizer is not None else None
    dataset = RegionDataset(cache, classes, texts, recipe.data.regions_per_image, recipe.data.augment, recipe.data.view)
    text_classes = len(texts) if texts else 0
    objective = RiceObjective(tower, len(classes), text_classes, recipe.model.rice, recipe.train.seed)
    if recipe.model.keep_heads:
        load_centres(objective, classes, parent_run(recipe.model))

    centres: dict[str, torch.Tensor] = {}

    def save(folder: Path) -> None:
        save_tower(objective.tower, folder)
        save_centres(centres, classes, folder)

    regions = sum(len(image.boxes) for image in dataset.labelled)
    about = f"{len(dataset)} of {len(cache)} images have labelled regions, {regions} in all; "
    about += f"{len(classes)} object classes; "
    if texts is None:
        about += "OCR regions are left out (data.tokenizer is not set)"
    else:
        with_text = sum(bool(ids) for image in dataset.labelled for ids in image.texts)
        about += f"{with_text} regions have text, {len(texts)} token classes"
    return Task(
        objective,
        dataset,
        collate_regions,
        save,
        about,
        classes=classes,
        before_save=lambda: centres.update(whole_centres(objective)),
    )
