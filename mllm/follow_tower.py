"""What in a LLaVA's configuration and processor has to agree with its tower, and how it follows a new one."""

import copy
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig
from transformers.models.llava.image_processing_llava import LlavaImageProcessor

from ..vision_towers import TowerSpec, UserError, describe_tower, tower_image_processor
from ..vision_towers.describe import side_of
from .config import RegionLlavaConfig
from .projectors import image_token_count


@dataclass(frozen=True)
class Family:
    """A kind of LLaVA.

    Args:
        tiles: cuts pictures into tiles of the tower's size; else it sees one square.
        regions: reads boxes, so its tower keeps a readout and is one of ours.
        own_layers: reads several layers side by side and keeps its own list of them.
        drops_first: drops token 0 whatever the tower puts there.
    """

    tiles: bool = False
    regions: bool = False
    own_layers: bool = False
    drops_first: bool = False


FAMILIES = {
    "llava": Family(),
    "llava_next": Family(tiles=True),
    "llava_onevision": Family(tiles=True),
    "vipllava": Family(own_layers=True, drops_first=True),
    "region_llava": Family(regions=True),
    "region_llava_next": Family(tiles=True, regions=True),
}


def family_of(config: PreTrainedConfig) -> Family:
    """How this LLaVA follows its tower.

    Raises:
        UserError: a model whose tower cannot be swapped.
    """
    family = FAMILIES.get(config.model_type)
    if family is None:
        known = ", ".join(FAMILIES)
        raise UserError(f"the tower of a {config.model_type} cannot be swapped; it can in {known}.")
    return family


def follow_in_config(config: Any, tower: Any, feature_layer: int | None) -> None:
    """Change a LLaVA's configuration, in place, to that of the same model on another tower.

    Args:
        tower: the new `vision_config`.
        feature_layer: `hidden_states` entry for the language model; the tower's default when absent.
    Raises:
        UserError: the tower has no such layer, or this LLaVA cannot read its tokens.
    """
    family, spec = family_of(config), describe_tower(tower)
    if family.drops_first and spec.num_prefix_tokens != 1:
        raise UserError(
            f"a {config.model_type} drops the first token of its tower, and a {type(tower).model_type} has "
            f"{spec.num_prefix_tokens} before its patches; swap in a tower with one class token."
        )
    old_side = side_of(config.vision_config.image_size)
    layers = spec.default_feature_layer
    if feature_layer is not None:
        layers = feature_layer
    elif family.own_layers:
        layers = config.vision_feature_layer
    _check_layers(layers, tower)
    config.vision_config, config.vision_feature_layer = tower, layers
    followed = {
        "vision_feature_select_strategy": spec.select_strategy,
        "image_seq_length": _tokens(config, spec.grid(spec.image_size, spec.image_size)),
    }
    if family.tiles:
        followed["image_grid_pinpoints"] = [
            [max(1, round(side / old_side)) * spec.image_size for side in point]
            for point in config.image_grid_pinpoints
        ]
    for name, value in followed.items():
        if hasattr(config, name):  # each kind of LLaVA has some of them
            setattr(config, name, value)


def _tokens(config: Any, grid_hw: tuple[int, int]) -> int:
    """Image tokens of one view."""
    if not isinstance(config, RegionLlavaConfig):
        return grid_hw[0] * grid_hw[1]
    if grid_hw[0] % config.merge_size or grid_hw[1] % config.merge_size:
        raise UserError(
            f"the model merges blocks of {config.merge_size} x {config.merge_size} patches, and this tower has "
            f"{grid_hw[0]} x {grid_hw[1]}; choose an image size with an even number of patches a side."
        )
    return image_token_count(grid_hw, config.merge_size, config.row_end)


def follow_in_processor(processor: Any, config: Any) -> Any:
    """A processor for the model of `config`: its pixels and its number of image tokens are the tower's.

    Pictures are never cropped at the centre, which cuts boxes off: a single view is padded to a square. Everything that
    has nothing to do with the tower (tokenizer, chat template, resampling) is the given processor's.
    """
    spec = describe_tower(config.vision_config)
    rows, columns = spec.grid(spec.image_size, spec.image_size)
    followed = {
        "image_processor": _image_processor(processor.image_processor, config, spec),
        "patch_size": spec.patch_size,
        "image_size": spec.image_size,
        "num_prefix_tokens": 0,
        "num_additional_image_tokens": spec.num_prefix_tokens,
        "num_image_tokens": rows * columns + spec.num_prefix_tokens,
        "vision_feature_select_strategy": spec.select_strategy,
    }
    if getattr(processor, "video_processor", None) is not None:
        followed["video_processor"] = _same_kind(processor.video_processor, _pixels(spec))
    new = copy.copy(processor)
    for name, value in followed.items():
        if hasattr(processor, name):
            setattr(new, name, value)
    return new


def _image_processor(old: Any, config: Any, spec: TowerSpec) -> Any:
    side = spec.image_size
    crop = {"crop_size": {"height": side, "width": side}}
    if isinstance(config, RegionLlavaConfig):
        return tower_image_processor(config.vision)  # pictures are letterboxed by the model's own processor
    if not family_of(config).tiles:
        padded: dict[str, Any] = _pixels(spec) | crop | {"size": {"shortest_edge": side}, "resample": old.resample}
        return LlavaImageProcessor(do_pad=True, **padded)
    fields = _pixels(spec) | {"image_grid_pinpoints": config.image_grid_pinpoints}
    # The size of a tile is read off crop_size where there is one, and off size where not.
    return _same_kind(old, fields | (crop if old.crop_size is not None else {}))


def _pixels(spec: TowerSpec) -> dict[str, Any]:
    square = {"height": spec.image_size, "width": spec.image_size}
    return {"size": square, "image_mean": list(spec.image_mean), "image_std": list(spec.image_std)}


def _same_kind(old: Any, changed: dict[str, Any]) -> Any:
    kept = {k: v for k, v in old.to_dict().items() if k not in ("image_processor_type", "video_processor_type")}
    return type(old)(**kept | changed)


def _check_layers(layers: int | list[int] | tuple[int, ...], tower: Any) -> None:
    depth = tower.num_hidden_layers
    for layer in [layers] if isinstance(layers, int) else layers:
        if not -depth - 1 <= layer <= depth:
            raise UserError(
                f"the model reads hidden state {layer}, and a tower of {depth} layers has {depth + 1}; "
                f"give a feature layer between {-depth - 1} and {depth}."
            )
