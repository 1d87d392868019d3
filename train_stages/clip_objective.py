"""The control: CLIP's image-text objective on the same tower, with a small text tower."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedModel

from ..vision_towers import describe_tower
from ..vision_towers.errors import UserError
from ..vision_towers.text_tower import text_states
from .contrastive import contrastive_loss
from .gather import world
from .normalise import PixelNorm
from .rice_objective import ObjectiveOutput


@dataclass(frozen=True)
class ClipConfig:
    """Sizes of the text tower (a pre-norm causal transformer, pooled at the end token) and of the shared space.

    max_tokens: of a text, its end token among them.
    Raises UserError for sizes that no tower can have.
    """

    embed_dim: int = 192
    text_hidden: int = 192
    text_layers: int = 4
    text_heads: int = 6
    max_tokens: int = 64

    def __post_init__(self) -> None:
        least = {"embed_dim": 1, "text_hidden": 1, "text_layers": 1, "text_heads": 1, "max_tokens": 2}
        for name, smallest in least.items():
            if getattr(self, name) < smallest:
                raise UserError(f"{name} is {getattr(self, name)}, it must be at least {smallest}")
        if self.text_hidden % self.text_heads:
            raise UserError(f"text_heads is {self.text_heads}, it must divide text_hidden, {self.text_hidden}")


def text_config(sizes: ClipConfig, vocab_size: int, end_id: int) -> CLIPTextConfig:
    """The text tower's configuration."""
    return CLIPTextConfig(
        vocab_size=vocab_size,
        hidden_size=sizes.text_hidden,
        intermediate_size=4 * sizes.text_hidden,
        num_hidden_layers=sizes.text_layers,
        num_attention_heads=sizes.text_heads,
        max_position_embeddings=sizes.max_tokens,
        projection_dim=sizes.embed_dim,
        bos_token_id=end_id,  # unused: captions begin with their first word
        eos_token_id=end_id,
    )


class ClipObjective(nn.Module):
    """The tower's `pooler_output` and the text tower's end token, projected into one space."""

    def __init__(self, tower: PreTrainedModel, vocab_size: int, end_id: int, config: ClipConfig):
        super().__init__()
        spec = describe_tower(tower.config)
        self.tower = tower
        self.norm = PixelNorm(spec.image_mean, spec.image_std)
        self.text_tower = CLIPTextModel(text_config(config, vocab_size, end_id))
        self.image_projection = nn.Linear(spec.hidden_size, config.embed_dim, bias=False)
        self.text_projection = nn.Linear(config.text_hidden, config.embed_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor([math.log(1 / 0.07)]))  # (1,): FSDP2 shards no scalars

    def forward(self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor) -> ObjectiveOutput:
        """pixel_values: (B, 3, S, S), uint8, or float already normalised. input_ids, attention_mask: (B, T), padded on
        the right, each row ending in its end token."""
        image = self.image_projection(self.tower(self.norm(pixel_values)).pooler_output)
        text = self.text_projection(text_states(self.text_tower, input_ids, attention_mask))
        found = contrastive_loss(image, text, self.logit_scale, group=world())
        return ObjectiveOutput(loss=found.loss, metrics={"image_to_text_top1": found.correct.float().mean()})
