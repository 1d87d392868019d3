"""What a tower's configuration says about its tokens: everything that has to agree with the tower is derived from here.

Keyed on `config.model_type` and nothing else: a name or a path never decides how a tower is read.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from transformers import PreTrainedConfig

from .errors import UserError

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF_MEAN, HALF_STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class TowerSpec:
    """The facts about a tower that the rest of the system needs.

    Args:
        hidden_size: width of an image token.
        region_dim: width of a region embedding; 0 for a tower without a region readout.
        patch_size: pixels a patch side.
        image_size: pixels a side of the square the tower was made for.
        num_prefix_tokens: tokens before the patches in `hidden_states` (CLS and registers).
        default_feature_layer: `hidden_states` entry for the language model.
        positions: "learned" (a table), "rotary" (in the attention) or "sinusoidal" (computed and added).
        any_resolution: takes any H x W multiple of the patch as it is.
        region_readout: "rice", "roi", "cloc", "umg_clip" or "none".
        image_mean, image_std: of the pixels in 0..1, RGB.
    """

    hidden_size: int
    region_dim: int
    patch_size: int
    image_size: int
    num_prefix_tokens: int
    default_feature_layer: int
    positions: Literal["learned", "rotary", "sinusoidal"]
    any_resolution: bool
    region_readout: str
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches for an input of `height` x `width` pixels."""
        return height // self.patch_size, width // self.patch_size

    @property
    def select_strategy(self) -> Literal["default", "full"]:
        """LLaVA's `vision_feature_select_strategy`: "default" drops token 0, so only a single CLS may be there."""
        return "default" if self.num_prefix_tokens == 1 else "full"


Describe = Callable[[PreTrainedConfig], TowerSpec]
_REGISTRY: dict[str, Describe] = {}


def register_tower(model_type: str, describe: Describe) -> None:
    """Add a tower by its exact `model_type`; `describe` turns its configuration into a `TowerSpec`.

    Raises:
        UserError: the type is registered already.
    """
    if model_type in _REGISTRY:
        raise UserError(f"tower type {model_type!r} is registered already; choose another model_type.")
    _REGISTRY[model_type] = describe


def registered_towers() -> dict[str, Describe]:
    """All registered towers, by `model_type`."""
    return dict(_REGISTRY)


def describe_tower(config: PreTrainedConfig) -> TowerSpec:
    """The `TowerSpec` of a vision configuration.

    Raises:
        UserError: the `model_type` is not registered.
    """
    model_type = type(config).model_type  # not the instance's: an old file puts its alias there (`mlcd`)
    describe = _REGISTRY.get(model_type)
    if describe is None:
        known = ", ".join(sorted(_REGISTRY))
        raise UserError(f"no tower of type {model_type!r} is registered (known: {known}); see register_tower.")
    return describe(config)


def _native(
    *,
    prefix: int | Callable[[PreTrainedConfig], int],
    layer: int,
    positions: Literal["learned", "rotary", "sinusoidal"],
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    any_resolution: bool = False,
) -> Describe:
    """A describer for a native Hugging Face ViT, which has no region readout of its own."""

    def describe(config: PreTrainedConfig) -> TowerSpec:
        return TowerSpec(
            hidden_size=config.hidden_size,
            region_dim=0,
            patch_size=side_of(config.patch_size),
            image_size=side_of(config.image_size),
            num_prefix_tokens=prefix if isinstance(prefix, int) else prefix(config),
            default_feature_layer=layer,
            positions=positions,
            any_resolution=any_resolution,
            region_readout="none",
            image_mean=mean,
            image_std=std,
        )

    return describe


def side_of(size: int | list[int] | tuple[int, ...]) -> int:
    """A square side; configurations write it as a number or as a pair.

    Raises:
        UserError: a pair of unequal sides, which no tower here takes.
    """
    if isinstance(size, int):
        return size
    if len(set(size)) != 1:
        raise UserError(f"the tower's size {size} is not square; give a square image and patch size.")
    return size[0]


def _describe_aimv2(config: PreTrainedConfig) -> TowerSpec:
    """AIMv2 comes in two kinds: with a table of positions, and "native", which computes them for any size."""
    spec = _native(prefix=0, layer=-1, positions="learned", mean=CLIP_MEAN, std=CLIP_STD)(config)
    return replace(spec, positions="sinusoidal", any_resolution=True) if config.is_native else spec


# The feature layer follows each family's use in LLaVA models: -2 where the last block's patch tokens get no loss of
# their own (CLIP, MLCD: the loss sits on the pooled CLS), -1 where they do. SigLIP and AIMv2 have no CLS token.
register_tower("clip_vision_model", _native(prefix=1, layer=-2, positions="learned", mean=CLIP_MEAN, std=CLIP_STD))
register_tower(
    "mlcd_vision_model",
    _native(prefix=1, layer=-2, positions="rotary", mean=CLIP_MEAN, std=CLIP_STD, any_resolution=True),
)
register_tower("siglip_vision_model", _native(prefix=0, layer=-2, positions="learned", mean=HALF_MEAN, std=HALF_STD))
register_tower(
    "dinov2",
    _native(prefix=1, layer=-1, positions="learned", mean=IMAGENET_MEAN, std=IMAGENET_STD, any_resolution=True),
)
register_tower(
    "dinov3_vit",
    _native(
        prefix=lambda config: 1 + config.num_register_tokens,
        layer=-1,
        positions="rotary",
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        any_resolution=True,
    ),
)
register_tower("aimv2_vision_model", _describe_aimv2)
