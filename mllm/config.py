"""Configurations: LLaVA's and LLaVA-NeXT's, plus where regions go and how images become tokens."""

from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import LlavaConfig, LlavaNextConfig, PreTrainedConfig

from ..vision_towers import UserError, describe_tower

TOKEN_IDS = {"image_token_id": "image_token_index", "region_token_id": "region_token_index"}


class RegionParts:
    """What the configurations below say about their parts."""

    vision_config: Any
    text_config: Any
    image_token_index: int
    region_token_index: int

    def check_tokens(self) -> None:
        """Raises UserError when the two placeholders are one token."""
        if self.image_token_index == self.region_token_index:
            raise UserError(f"image and region token share id {self.image_token_index}; give each its own.")

    @property
    def vision(self) -> PreTrainedConfig:
        """The tower's configuration (`vision_config`, which is declared more loosely)."""
        assert isinstance(self.vision_config, PreTrainedConfig)
        return self.vision_config

    @property
    def text(self) -> PreTrainedConfig:
        """The language model's configuration (`text_config`)."""
        assert isinstance(self.text_config, PreTrainedConfig)
        return self.text_config

    @property
    def region_dim(self) -> int:
        """Width of the tower's region embeddings.

        Raises:
            UserError: the tower has no region readout.
        """
        spec = describe_tower(self.vision)
        if not spec.region_dim:
            kind = self.vision.model_type
            raise UserError(f"a {kind} has no region readout; open it with load_tower, which adds one.")
        return spec.region_dim


@strict
class RegionLlavaConfig(RegionParts, LlavaConfig):
    """`LlavaConfig` with region tokens and three choices about image tokens.

    Args:
        region_token_index: id of `<region>` (also readable as `region_token_id`).
        projector: "mlp" (LLaVA-1.5's) or "merge2x2_mlp" (each 2x2 block of patches becomes one token).
        image_position: "none", or "sin2d" to add a projected 2D sinusoidal code to the image tokens. A rotary tower
            leaves almost no absolute position in them. Not in the RICE paper.
        row_end: put a learned embedding after each row of image tokens, so that images of any H x W can be told apart.
    """

    model_type = "region_llava"
    attribute_map = TOKEN_IDS

    region_token_index: int = 32001
    projector: Literal["mlp", "merge2x2_mlp"] = "mlp"
    image_position: Literal["none", "sin2d"] = "none"
    row_end: bool = False

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self.check_tokens()

    @property
    def merge_size(self) -> int:
        """Patches a side that become one image token."""
        return 2 if self.projector == "merge2x2_mlp" else 1

    @property
    def plain_exportable(self) -> bool:
        """Whether plain transformers can run the same weights (without regions)."""
        return self.projector == "mlp" and self.image_position == "none" and not self.row_end


@strict
class RegionLlavaNextConfig(RegionParts, LlavaNextConfig):
    """`LlavaNextConfig` with region tokens.

    Args:
        region_token_index: id of `<region>` (also readable as `region_token_id`).
    """

    model_type = "region_llava_next"
    attribute_map = TOKEN_IDS

    region_token_index: int = 32001

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self.check_tokens()
