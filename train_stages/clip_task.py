"""CLIP as a task of stage 0: a tower and a text tower, on captions."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .clip_objective import ClipObjective
from .objective_task import Task, parent_run, save_tower
from .pretrain_data import CaptionItems
from .pretrain_heads import load_text_side, save_text_side
from .pretrain_recipe import PretrainRecipe
from .records import Record


def clip_task(
    recipe: PretrainRecipe, tower: PreTrainedModel, records: Iterable[Record], tokenizer: PreTrainedTokenizerBase
) -> Task:
    """The tower beside a text tower that is new, or kept as `model.keep_heads` says.

    Raises:
        UserError: a tokenizer without an end or a padding token, or heads that cannot be kept (`load_text_side`).
    """
    data = recipe.data
    items = CaptionItems(tokenizer, recipe.model.clip.max_tokens, data.augment, data.captions, data.view)
    objective = ClipObjective(tower, len(tokenizer), items.tokens.end_id, recipe.model.clip)
    if recipe.model.keep_heads:
        load_text_side(objective, tokenizer, parent_run(recipe.model))

    def save(folder: Path) -> None:
        save_tower(objective.tower, folder)
        save_text_side(objective, tokenizer, folder)

    return Task(objective, objective.tower, items, save, lambda known: "captions")
