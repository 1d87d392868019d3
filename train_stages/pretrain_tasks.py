"""Which task stage 0 has: one for each objective, and the tower that it starts from."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..vision_towers import RiceVisionConfig, RiceVisionModel, load_tower
from ..vision_towers.errors import UserError
from .clip_task import clip_task
from .cloc_task import cloc_task
from .objective_task import Task
from .pretrain_recipe import PretrainModel, PretrainRecipe
from .records import Record
from .rice_task import rice_task
from .umg_clip_task import umg_clip_task

READ_TEXTS = {"clip": clip_task, "cloc": cloc_task, "umg_clip": umg_clip_task}


def make_task(
    recipe: PretrainRecipe,
    tower: PreTrainedModel,
    records: Iterable[Record],
    tokenizer: PreTrainedTokenizerBase | None,
) -> Task:
    """The task of `recipe.model.objective`.

    records: gone through at most once, for the classes and tags that occur.
    Raises UserError for data or a tokenizer that it cannot work with.
    """
    objective = recipe.model.objective
    if objective == "rice":
        return rice_task(recipe, tower, records, tokenizer)
    if tokenizer is None:
        raise UserError(f"the {objective} objective reads texts: set data.tokenizer to the folder of a tokenizer.")
    return READ_TEXTS[objective](recipe, tower, records, tokenizer)


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
