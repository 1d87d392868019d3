"""Configuration of the RICE tower: MLCD's, plus which layers are region layers."""

from huggingface_hub.dataclasses import strict
from transformers import MLCDVisionConfig

from .errors import UserError
from .region_boxes import MASK_RULES


@strict
class RiceVisionConfig(MLCDVisionConfig):
    """`MLCDVisionConfig` with the two choices the paper leaves open (RICE, Sec. 3.2).

    Args:
        num_region_layers: how many of the last layers are region layers. Not in the paper ("the later layers");
            we take 2 by default.
        region_mask_rule: "centre" (a patch belongs to a box that holds its centre) or "overlap". Not in the paper.
    """

    model_type = "rice_vision_model"

    num_region_layers: int = 2
    region_mask_rule: str = "centre"

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if not 1 <= self.num_region_layers <= self.num_hidden_layers:
            raise UserError(
                f"num_region_layers must lie between 1 and num_hidden_layers={self.num_hidden_layers}, "
                f"got {self.num_region_layers}."
            )
        if self.region_mask_rule not in MASK_RULES:
            raise UserError(f"region_mask_rule must be one of {', '.join(MASK_RULES)}, got {self.region_mask_rule!r}.")

    @classmethod
    def from_native(cls, config: MLCDVisionConfig, **region_fields) -> "RiceVisionConfig":
        """Lift an MLCD configuration; `region_fields` are `num_region_layers` and `region_mask_rule`."""
        fields = config.to_dict()
        for name in ("model_type", "architectures"):
            fields.pop(name, None)
        return cls(**fields, **region_fields)

    def to_native(self) -> MLCDVisionConfig:
        """The same ViT as plain transformers knows it."""
        fields = self.to_dict()
        for name in ("model_type", "num_region_layers", "region_mask_rule", "architectures"):
            fields.pop(name, None)
        return MLCDVisionConfig(**fields)
