"""CLOC as a task of stage 0: a whole `ClocModel`, on captions and regions with words."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..vision_towers import ClocConfig, ClocModel, ClocVisionModel, load_cloc, tower_image_processor
from .clip_objective import text_config
from .cloc_data import GroundedCaptionItems, GroundedImage
from .cloc_objective import ClocObjective
from .objective_task import Task, parent_run
from .pretrain_heads import check_settings, check_tokenizer, text_sizes
from .pretrain_recipe import ClocSettings, PretrainModel, PretrainRecipe
from .records import Record


def cloc_task(
    recipe: PretrainRecipe, tower: PreTrainedModel, records: Iterable[Record], tokenizer: PreTrainedTokenizerBase
) -> Task:
    """A `ClocModel`: new, around the native ViT of `tower` or around `tower` itself when it has a Prompter, or kept as
    `model.keep_heads` says.

    Raises:
        UserError: a tokenizer without an end or a padding token, other settings than those of what is kept, or with
            `model.keep_heads` no whole CLOC in `model.tower`, or one that reads another vocabulary.
    """
    data, settings = recipe.data, recipe.model.cloc
    items = GroundedCaptionItems(tokenizer, settings.text.max_tokens, data.regions_per_image, data.augment, data.view)
    if recipe.model.keep_heads:
        model = _kept(recipe.model, tokenizer)
    else:
        model = _new_cloc(recipe.model, tower, len(tokenizer), items.tokens.end_id)

    def save(folder: Path) -> None:
        model.save_pretrained(folder)
        tower_image_processor(model.vision_tower.config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    objective = ClocObjective(model, settings.loss)
    return Task(objective, model.vision_tower, items, save, _about, tower="model.vision_tower.tower")


def _about(known: Sequence[GroundedImage]) -> str:
    return f"captions or regions with words, {sum(len(image.words) for image in known)} regions in all"


def _kept(recipe: PretrainModel, tokenizer: PreTrainedTokenizerBase) -> ClocModel:
    """All of the finished run in `model.tower`."""
    folder, settings = parent_run(recipe), recipe.cloc
    model = load_cloc(folder, dtype=torch.float32)
    check_tokenizer(tokenizer, folder)
    check_settings("model.cloc.text", asdict(settings.text), text_sizes(model.text_tower.config), folder)
    _check_prompter(settings, model.vision_tower, folder)
    return model


def _check_prompter(settings: ClocSettings, tower: ClocVisionModel, source: Path | str) -> None:
    """Raises UserError when the recipe asks for another Prompter than `tower` has."""
    config, positions = tower.config, settings.add_token_pos
    wanted = {
        "prompter_heads": settings.prompter_heads,
        "prompter_pool": settings.prompter_pool,
        "add_token_pos": tower.spec.positions == "rotary" if positions is None else positions,
        "region_pool": settings.region_pool,
    }
    there = {key: getattr(config, key) for key in wanted} | {"add_token_pos": tower.prompter.add_token_pos}
    check_settings("model.cloc", wanted, there, source)
    check_settings("model.cloc.text", asdict(settings.text), {"embed_dim": config.projection_dim}, source)


def _new_cloc(recipe: PretrainModel, tower: Any, vocabulary: int, end_id: int) -> ClocModel:
    """A `ClocModel` around the native ViT of `tower`, or around `tower` itself when it has a Prompter."""
    settings, sizes = recipe.cloc, recipe.cloc.text
    if isinstance(tower, ClocVisionModel):
        _check_prompter(settings, tower, str(recipe.tower))
    else:
        tower = ClocVisionModel.from_native(
            tower.to_native(),
            projection_dim=sizes.embed_dim,
            prompter_heads=settings.prompter_heads,
            prompter_pool=settings.prompter_pool,
            add_token_pos=settings.add_token_pos,
            region_pool=settings.region_pool,
        )
    text = text_config(sizes, vocabulary, end_id)
    model = ClocModel(ClocConfig(vision_config=tower.config, text_config=text))
    model.vision_tower = tower
    return model
