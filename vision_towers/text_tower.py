"""One embedding of a text: the state of its last token."""

import torch
from transformers import PreTrainedModel


def text_states(text_tower: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """`(n, width)` of `input_ids, attention_mask (n, T)`, padded on the right, each row ending in its end token.

    `CLIPTextModel`'s own pooling finds the end token by its id, and differently for id 2. No row gives `(0, width)`.
    """
    if not len(input_ids):
        return torch.zeros(0, text_tower.config.hidden_size, dtype=text_tower.dtype, device=input_ids.device)
    states = text_tower(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
    return states[torch.arange(len(states), device=states.device), attention_mask.sum(dim=1) - 1]
