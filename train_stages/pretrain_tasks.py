"""What each objective of stage 0 trains, on which items, and what it leaves behind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..vision_towers import (
    ClocConfig,
    ClocModel,
    ClocVisionModel,
    RiceVisionConfig,
    RiceVisionModel,
    load_tower,
    tower_image_processor,
)
from ..vision_towers.errors import UserError
from .clip_objective import ClipObjective, text_config
from .cloc_data import GroundedCaptionDataset
from .cloc_objective import ClocObjective
from .pixels import PixelCache
from .pretrain_data import CaptionDataset, RegionDataset, collate_regions
from .pretrain_heads import load_centres, load_text_side, save_centres, save_text_side, whole_centres
from .pretrain_recipe import PretrainModel, PretrainRecipe
from .region_labels import ObjectClasses, TextClasses
from .rice_objective import RiceObjective


@dataclass(frozen=True)
class Task:
    """A stage ready to run: what the engine takes, and a line for the user about the data."""

    objective: nn.Module
    dataset: Any
    collate: Callable[[list], dict[str, torch.Tensor]]
    save: Callable[[Path], None]
    about: str
    tower: str = "tower"  # name of the native or RICE tower in the objective; all else is heads
    classes: ObjectClasses | None = None
    before_save: Callable[[], None] = lambda: None


def make_task(
    recipe: PretrainRecipe, tower: PreTrainedModel, cache: PixelCache, tokenizer: PreTrainedTokenizerBase | None
) -> Task:
    """The task of `recipe.model.objective`. Raises UserError for data or a tokenizer that it cannot work with."""
    if recipe.model.objective == "rice":
        return _rice_task(recipe, tower, cache, tokenizer)
    if tokenizer is None:
        raise UserError(
            f"the {recipe.model.objective} objective reads captions: set data.tokenizer to the folder of a tokenizer."
        )
    make = _clip_task if recipe.model.objective == "clip" else _cloc_task
    return make(recipe, tower, cache, tokenizer)


def start_tower(model: PretrainModel) -> PreTrainedModel:
    """The tower that `model.tower` names (fp32), or a new one of `model.size`."""
    if model.tower is not None:
        return load_tower(model.tower, dtype=torch.float32)
    size = model.size
    return RiceVisionModel(
        RiceVisionConfig(
            hidden_size=size.hidden_size,
            num_hidden_layers=size.layers,
            num_attention_heads=size.heads,
            intermediate_size=size.intermediate_size,
            patch_size=size.patch_size,
            image_size=size.image_size,
            num_region_layers=size.num_region_layers,
            region_mask_rule=size.region_mask_rule,
        )
    )


def _rice_task(
    recipe: PretrainRecipe, tower: PreTrainedModel, cache: PixelCache, tokenizer: PreTrainedTokenizerBase | None
) -> Task:
    classes = ObjectClasses.of(cache.records, recipe.data.object_labels, recipe.data.stuff)
    texts = TextClasses(tokenizer) if tokenizer is not None else None
    dataset = RegionDataset(cache, classes, texts, recipe.data.regions_per_image, recipe.data.augment, recipe.data.view)
    text_classes = len(texts) if texts else 0
    objective = RiceObjective(tower, len(classes), text_classes, recipe.model.rice, recipe.train.seed)
    if recipe.model.keep_heads:
        load_centres(objective, classes, _parent_run(recipe.model))

    centres: dict[str, torch.Tensor] = {}

    def save(folder: Path) -> None:
        _save_tower(objective.tower, folder)
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


def _clip_task(
    recipe: PretrainRecipe, tower: PreTrainedModel, cache: PixelCache, tokenizer: PreTrainedTokenizerBase
) -> Task:
    data = recipe.data
    dataset = CaptionDataset(cache, tokenizer, recipe.model.clip.max_tokens, data.augment, data.captions, data.view)
    objective = ClipObjective(tower, len(tokenizer), dataset.tokens.end_id, recipe.model.clip)
    if recipe.model.keep_heads:
        load_text_side(objective, _parent_run(recipe.model))

    def save(folder: Path) -> None:
        _save_tower(objective.tower, folder)
        save_text_side(objective, tokenizer, folder)

    return Task(objective, dataset, dataset.collate, save, f"{len(dataset)} of {len(cache)} images have captions")


def _cloc_task(
    recipe: PretrainRecipe, tower: PreTrainedModel, cache: PixelCache, tokenizer: PreTrainedTokenizerBase
) -> Task:
    data, settings = recipe.data, recipe.model.cloc
    dataset = GroundedCaptionDataset(
        cache, tokenizer, settings.text.max_tokens, data.regions_per_image, data.augment, data.view
    )
    if recipe.model.keep_heads:
        model = ClocModel.from_pretrained(_parent_run(recipe.model), dtype=torch.float32)
    else:
        model = _new_cloc(recipe.model, tower, len(tokenizer), dataset.tokens.end_id)

    def save(folder: Path) -> None:
        model.save_pretrained(folder)
        tower_image_processor(model.vision_tower.config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    about = (
        f"{len(dataset)} of {len(cache)} images have captions or regions with words, {dataset.regions} regions in all"
    )
    objective = ClocObjective(model, settings.loss)
    return Task(objective, dataset, dataset.collate, save, about, tower="model.vision_tower.tower")


def _new_cloc(recipe: PretrainModel, tower: Any, vocabulary: int, end_id: int) -> ClocModel:
    """A `ClocModel` around the native ViT of `tower`, or around `tower` itself when it has a Prompter."""
    settings, sizes = recipe.cloc, recipe.cloc.text
    if not isinstance(tower, ClocVisionModel):
        tower = ClocVisionModel.from_native(
            tower.to_native(),
            projection_dim=sizes.embed_dim,
            prompter_heads=settings.prompter_heads,
            prompter_pool=settings.prompter_pool,
            add_token_pos=settings.add_token_pos,
        )
    text = text_config(sizes, vocabulary, end_id)
    model = ClocModel(ClocConfig(vision_config=tower.config, text_config=text))
    model.vision_tower = tower
    return model


def _parent_run(model: PretrainModel) -> Path:
    if model.tower is None or not Path(model.tower).is_dir():
        raise UserError("model.keep_heads goes on with the heads of a finished run: set model.tower to its folder.")
    return Path(model.tower)


def _save_tower(tower: PreTrainedModel, folder: Path) -> None:
    tower.save_pretrained(folder)
    tower_image_processor(tower.config).save_pretrained(folder)
