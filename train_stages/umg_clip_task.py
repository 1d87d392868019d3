"""UMG-CLIP as a task of stage 0: a whole `UmgClipModel`, on captions, tags, regions and masks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..vision_towers import UmgClipConfig, UmgClipModel, UmgClipVisionModel, load_umg_clip, tower_image_processor
from ..vision_towers.errors import UserError
from .clip_objective import text_config
from .objective_task import Task
from .pretrain_data import CaptionTokens
from .pretrain_recipe import PretrainModel, PretrainRecipe, UmgClipSettings
from .records import Record
from .region_labels import open_tokenizer
from .tag_bank import TagBank
from .umg_clip_data import TaggedImage, TaggedRegionItems
from .umg_clip_objective import UmgClipObjective


def umg_clip_task(
    recipe: PretrainRecipe, tower: PreTrainedModel, records: Iterable[Record], tokenizer: PreTrainedTokenizerBase
) -> Task:
    """A `UmgClipModel`, new around the native ViT of `tower`, or kept as `model.keep_heads` says.

    Raises:
        UserError: a tokenizer without an end or a padding token, settings that the tower cannot have, or with
            `model.keep_heads` nothing of this kind in `model.tower`, or one that reads another vocabulary.
    """
    data, settings = recipe.data, recipe.model.umg_clip
    make = _kept if recipe.model.keep_heads else _new
    model = make(recipe.model, tower, tokenizer)
    text, spec = model.text_tower.config, model.vision_tower.spec
    tokens = CaptionTokens(tokenizer, text.max_position_embeddings, framed=True, length=model.text_length)
    bank = TagBank.of(records)
    items = TaggedRegionItems(tokens, bank, spec.patch_size, data.regions_per_image, data.augment, data.view)
    objective = UmgClipObjective(model, *tokens.pad([tokens(name) for name in bank.names]), settings.loss)

    def save(folder: Path) -> None:
        model.save_pretrained(folder)
        tower_image_processor(model.vision_tower.config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    return Task(
        objective, model.vision_tower, items, save, _about, f"{len(bank)} tags", tower="model.vision_tower.tower"
    )


def _about(known: Sequence[TaggedImage]) -> str:
    regions = [region for image in known for region in image.regions]
    with_mask = sum(region.mask is not None for region in regions)
    return f"captions, tags or regions with words; {len(regions)} regions in all, {with_mask} with a mask"


def _new(recipe: PretrainModel, tower: Any, tokenizer: PreTrainedTokenizerBase) -> UmgClipModel:
    """The native ViT of `tower` beside a new text tower and new projections."""
    settings = recipe.umg_clip
    vision = UmgClipVisionModel.from_native(tower.to_native(), **_fields(settings))
    end_id = tokenizer.eos_token_id
    if not isinstance(end_id, int):
        raise UserError("the tokenizer has no end token; the umg_clip objective needs one")
    text = text_config(settings.text, len(tokenizer), end_id)
    made = UmgClipModel(
        UmgClipConfig(vision_config=vision.config, text_config=text, projection_dim=settings.text.embed_dim)
    )
    made.vision_tower = vision
    return made


def _kept(recipe: PretrainModel, tower: Any, tokenizer: PreTrainedTokenizerBase) -> UmgClipModel:
    """All of what `model.tower` names: a finished run, or a native CLIP or SigLIP with its text tower."""
    if recipe.tower is None:
        raise UserError(
            "model.keep_heads takes the text tower of a finished run, a CLIP or a SigLIP: set model.tower to it."
        )
    made = load_umg_clip(recipe.tower, dtype=torch.float32)
    if open_tokenizer(recipe.tower).get_vocab() != tokenizer.get_vocab():
        raise UserError(
            f"model.keep_heads takes the text tower of {recipe.tower!r}, which reads another vocabulary than "
            "data.tokenizer: name the same as data.tokenizer, or set model.keep_heads=false."
        )
    before = made.vision_tower.config
    fields = {"pooling": before.pooling, "roi_size": before.roi_size, **_fields(recipe.umg_clip)}
    made.vision_tower = UmgClipVisionModel.from_native(made.vision_tower.to_native(), **fields)
    made.config.vision_config = made.vision_tower.config
    return made


def _fields(settings: UmgClipSettings) -> dict[str, Any]:
    """Those of `UmgClipVisionConfig` that the recipe decides."""
    pooling = {} if settings.pooling is None else {"pooling": settings.pooling}
    return {**pooling, "reduce_after": settings.reduce_after, "reduce_to": settings.reduce_to}
