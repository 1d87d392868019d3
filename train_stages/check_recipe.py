"""Whether a recipe of `align` or `instruct` can lead where it is meant to, before anything is loaded or trained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from transformers import AutoConfig

from ..mllm.check import Finding, check_model
from ..vision_towers import UserError, describe_tower
from ..vision_towers.packaged import model_source
from .engine.run_dir import RECIPE_FILE
from .mllm_stage import AlignRecipe, InstructRecipe
from .recipe import find_recipe, load_recipe, read_yaml

# With `<region>` in the question.
REGION_KINDS = frozenset({"referring", "reading", "region_caption", "classify", "compare", "point"})


def check_recipe(source: str | Path, overrides: Sequence[str] = ()) -> list[Finding]:
    """Findings of a recipe, and of the model that an `instruct` recipe goes on with; errors first.

    Args:
        source, overrides: as of `load_recipe`.
    Raises:
        UserError: a recipe that cannot be read, of another stage, or one whose models are not there.
    """
    blocks = (read_yaml(find_recipe(source)) or {}).get("model") or {}
    if "mllm" in blocks:
        instruct = load_recipe(source, InstructRecipe, overrides)
        config = _config(instruct.model.mllm)
        found = [*check_model(instruct.model.mllm), *_idle_blocks(instruct, config.vision_config, config)]
        return sorted(found, key=lambda finding: finding.level != "error")
    if "language_model" in blocks:
        align = load_recipe(source, AlignRecipe, overrides)
        tower = _config(align.model.tower)
        tower = getattr(tower, "vision_config", tower)  # a whole LLaVA: its tower is taken
        found = [*_size(align, tower), *_boxes(align), *_regions(align), *_idle_blocks(align, tower, None)]
        return sorted(found, key=lambda finding: finding.level != "error")
    raise UserError(
        f"{source} is no recipe of align or instruct (model.tower and model.language_model, or model.mllm)."
    )


def _config(name: str) -> Any:
    source = model_source(name)
    try:
        return AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise UserError(f"no model can be opened at {source!r}: {str(error).splitlines()[0]}") from error


def _size(recipe: AlignRecipe, tower: Any) -> Iterator[Finding]:
    spec, side = describe_tower(tower), recipe.model.image_size
    if side is not None and (side % spec.patch_size or (side != spec.image_size and not spec.any_resolution)):
        can = f"a multiple of {spec.patch_size}" if spec.any_resolution else str(spec.image_size)
        yield Finding(
            "error",
            f"model.image_size is {side}, and this tower takes {can} px",
            "its positions do not fit",
            f"set model.image_size to {can}, or leave it out",
        )


def _boxes(recipe: AlignRecipe) -> Iterator[Finding]:
    """A language model that was trained on boxes writes them in one convention."""
    path = Path(model_source(recipe.model.language_model)) / RECIPE_FILE
    if not path.is_file():
        return
    known = (yaml.safe_load(path.read_text(encoding="utf-8")).get("data") or {}).get("box_format")
    if known is not None and known != recipe.model.box_format:
        yield Finding(
            "warning",
            f"model.box_format is {recipe.model.box_format}, the language model learned {known}",
            "it has to unlearn one way of writing boxes and learn another",
            f"set model.box_format={known}",
        )


def _regions(recipe: AlignRecipe) -> Iterator[Finding]:
    if not any(weight and kind in REGION_KINDS for kind, weight in recipe.data.mix.items()):
        yield Finding(
            "error",
            "data.mix has no kind that asks about a region",
            "the region projector never gets a gradient",
            f"add one of {', '.join(sorted(REGION_KINDS))}",
        )


def _idle_blocks(recipe: AlignRecipe | InstructRecipe, tower: Any, config: Any) -> Iterator[Finding]:
    """Blocks behind the feature layer learn from regions or not at all."""
    spec = describe_tower(tower)
    if not recipe.lr.tower or spec.region_dim:
        return
    asked = recipe.model.feature_layer if isinstance(recipe, AlignRecipe) else config.vision_feature_layer
    layer = spec.default_feature_layer if asked is None else asked
    depth = tower.num_hidden_layers
    reached = max(at if at >= 0 else depth + 1 + at for at in ([layer] if isinstance(layer, int) else layer))
    if reached < depth:
        yield Finding(
            "warning",
            f"lr.tower is {recipe.lr.tower:g}, and the model reads hidden state {layer}",
            f"the last {depth - reached} blocks of the tower get no gradient",
            "set feature_layer to -1, or leave them out of the count of what is tuned",
        )
