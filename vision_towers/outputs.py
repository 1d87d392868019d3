"""What a tower returns, and what of it can be handed back in."""

from dataclasses import dataclass

import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling


@dataclass
class TowerOutput(BaseModelOutputWithPooling):
    """The output of a native Hugging Face vision model plus one embedding a box.

    `region_embeds` is `(B, R_max, region_dim)`, not normalised; rows at and beyond an image's `region_counts` are zero.
    It is None when the call named no boxes.
    """

    region_embeds: torch.Tensor | None = None


@dataclass(frozen=True)
class TowerFeatures:
    """Layer outputs of an earlier call, handed to `forward(features=...)` so that the ViT does not run twice.

    Args:
        hidden: `{layer: (B, tokens, hidden_size)}` in the numbering of `hidden_states` (0 = input of the first layer).
            The tower's `region_feature_layers` says which ones its readout needs.
        grid_hw: rows and columns of patches.
        input_hw: height and width in pixels of the model input; the frame of the boxes.
    """

    hidden: dict[int, torch.Tensor]
    grid_hw: tuple[int, int]
    input_hw: tuple[int, int]

    @classmethod
    def from_output(
        cls, output: BaseModelOutputWithPooling, input_hw: tuple[int, int], patch_size: int
    ) -> "TowerFeatures":
        """The features inside a tower output that was asked for `output_hidden_states=True`."""
        states = output.hidden_states or ()
        hidden = {layer: state for layer, state in enumerate(states) if state is not None}
        return cls(hidden, (input_hw[0] // patch_size, input_hw[1] // patch_size), input_hw)
