"""Whether a recipe of `align` or `instruct` can lead where it is meant to, before anything is loaded or trained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..mllm.check import findings_of, input_size
from ..mllm.checked import look_at
from ..mllm.config import RegionParts
from ..mllm.findings import Finding, errors_first
from ..mllm.regions import CONFIGS
from ..vision_towers import UserError, describe_tower
from ..vision_towers.load import tower_config
from ..vision_towers.packaged import model_source
from .check_boxes import foreign_boxes
from .engine.run_dir import RECIPE_FILE
from .mixture_recipe import CONVERSATIONS, MixtureData
from .mllm_stage import AlignModel, AlignRecipe, InstructRecipe
from .recipe import find_recipe, load_recipe, read_yaml

# With `<region>` in the question.
REGION_KINDS = frozenset({"referring", "reading", "region_caption", "classify", "compare", "point"})


def check_recipe(source: str | Path, overrides: Sequence[str] = ()) -> list[Finding]:
    """Findings of a recipe, and of the whole model that it goes on with; errors first.

    Args:
        source, overrides: as of `load_recipe`.
    Raises:
        UserError: a recipe that cannot be read, of another stage, or one whose models are not there.
    """
    recipe = read_stage_recipe(source, overrides)
    model = recipe.model
    if isinstance(model, AlignModel):
        tower, layer = tower_config(model.tower), model.feature_layer
        prompt, convention = model.region_prompt, model.box_format
        found = [*_size(model, tower), *_boxes(model)]
    else:
        whole = look_at(model.mllm)
        tower, layer = whole.config.vision_config, whole.config.vision_feature_layer
        # A plain model gets the defaults with its regions.
        prompt = getattr(whole.processor, "region_prompt", "tokens+coords")
        convention = getattr(whole.processor, "box_format", "int1000")
        found = [*findings_of(whole), *_kind(recipe, whole.config)]
    if isinstance(recipe.data, MixtureData):
        found += foreign_boxes(recipe.data, convention)
    embeds = "tokens" in prompt and _asks_about_regions(recipe)
    found += _regions(recipe, prompt, embeds)
    found += _idle_blocks(recipe, tower, layer, embeds)
    return errors_first(found)


def read_stage_recipe(source: str | Path, overrides: Sequence[str] = ()) -> AlignRecipe | InstructRecipe:
    """A recipe of `align` or `instruct`, whichever it is; one of a whole model is read as `instruct`'s.

    Raises:
        UserError: as `check_recipe`.
    """
    blocks = _block(source, _block(source, read_yaml(find_recipe(source)), "a recipe").get("model"), "model")
    if "mllm" in blocks:
        return load_recipe(source, InstructRecipe, overrides)
    if "language_model" in blocks:
        return load_recipe(source, AlignRecipe, overrides)
    raise UserError(
        f"{source} is no recipe of align or instruct (model.tower and model.language_model, or model.mllm)."
    )


def _block(source: str | Path, block: Any, what: str) -> Mapping[str, Any]:
    """A mapping of a recipe's file; an absent one is empty."""
    if not isinstance(block, Mapping | None):
        kind = "a list" if isinstance(block, list) else repr(block)
        raise UserError(f"{source}: {what} is a mapping of keys to values, and here it is {kind:.60}.")
    return block or {}


def _size(model: AlignModel, tower: Any) -> Iterator[Finding]:
    if model.image_size is not None:
        yield from input_size("model.image_size", model.image_size, describe_tower(tower))


def _boxes(model: AlignModel) -> Iterator[Finding]:
    """A language model that was trained on boxes writes them in one convention."""
    path = Path(model_source(model.language_model)) / RECIPE_FILE
    if not path.is_file():
        return
    known = _block(path, _block(path, read_yaml(path), "a recipe").get("data"), "data").get("box_format")
    if known is not None and known != model.box_format:
        yield Finding(
            "warning",
            f"model.box_format is {model.box_format}, the language model learned {known}",
            "it has to unlearn one way of writing boxes and learn another",
            f"set model.box_format={known}",
        )


def _kind(recipe: AlignRecipe | InstructRecipe, config: Any) -> Iterator[Finding]:
    """Our stages train models with regions, and add them to a Llava or LlavaNext; not below an adapter, whose base is
    opened again as it is."""
    if isinstance(config, RegionParts):
        return
    if config.model_type not in CONFIGS:
        yield Finding(
            "error",
            f"the model is a {config.model_type}",
            "align and instruct train models that take boxes, and it cannot become one",
            f"take a {' or '.join(CONFIGS)}, or another trainer",
        )
    elif isinstance(recipe, InstructRecipe) and (recipe.lora is not None or recipe.model.quant != "none"):
        yield Finding(
            "error",
            f"the model is a {config.model_type}, without regions",
            "with an adapter or a quantised base they are not added on the way",
            "write the model with `regiontower swap ... --regions` first, or align it",
        )


def _regions(recipe: AlignRecipe | InstructRecipe, prompt: str, embeds: bool) -> Iterator[Finding]:
    """embeds: whether a region of the data becomes an embedding."""
    if not recipe.lr.region_projector or embeds:
        return
    asks = "tokens" in prompt
    yield Finding(
        "error",
        "nothing in the data asks about a region" if asks else f"region_prompt {prompt} makes no region embeddings",
        "the region projector never gets a gradient, and training stops",
        (f"add one of {', '.join(sorted(REGION_KINDS))} to data.mix" if asks else "set region_prompt=tokens+coords")
        + ", or set lr.region_projector=0",
    )


def _asks_about_regions(recipe: AlignRecipe | InstructRecipe) -> bool:
    """Conversations do not: what stands in them is text."""
    data = recipe.data
    sources = data.sources if isinstance(data, MixtureData) else (data,)
    mixes = [source.mix for source in sources if source.format != CONVERSATIONS]
    return any(weight and kind in REGION_KINDS for mix in mixes for kind, weight in mix.items())


def _idle_blocks(
    recipe: AlignRecipe | InstructRecipe, tower: Any, feature_layer: int | list[int] | None, embeds: bool
) -> Iterator[Finding]:
    """Blocks behind the feature layer learn from region embeddings or not at all."""
    if not recipe.lr.tower:
        return
    spec, depth = describe_tower(tower), tower.num_hidden_layers
    layer = spec.default_feature_layer if feature_layer is None else feature_layer
    layers = [layer] if isinstance(layer, int) else [*layer]
    if embeds:
        layers.append(getattr(tower, "region_layer", -1))
    reached = max(at if at >= 0 else depth + 1 + at for at in layers)
    if reached < depth:
        yield Finding(
            "warning",
            f"lr.tower is {recipe.lr.tower:g}, and the model reads hidden state {layer}",
            f"the last {depth - reached} blocks of the tower get no gradient",
            "set feature_layer to -1, or leave them out of the count of what is tuned",
        )
