"""CLIP as a task of stage 0: a tower and a text tower, on captions."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .clip_objective import ClipObjective
from .objective_task import Task, parent_run, save_tower
from .pixels import PixelCache
from .pretrain_data import CaptionDataset
from .pretrain_heads import load_text_side, save_text_side
from .pretrain_recipe import PretrainRecipe


def clip_task(
    recipe: PretrainRecipe, tower: PreTrainedModel, cache: PixelCache, tokenizer: PreTrainedTokenizerBase
) -> Task:
    """The task."""
    data = recipe.data
    dataset = CaptionDataset(cache, tokenizer, recipe.model.clip.max_tokens, data.augment, data.captions, data.view)
    objective = ClipObjective(tower, len(tokenizer), dataset.tokens.end_id, recipe.model.clip)
    if recipe.model.keep_heads:
        load_text_side(objective, parent_run(recipe.model))

    def save(folder: Path) -> None:
        save_tower(objective.tower, folder)
        save_text_side(objective, tokenizer, folder)

    return Task(objective, dataset, dataset.collate, save, f"{len(dataset)} of {len(cache)} images have captions")
