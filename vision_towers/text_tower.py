"""One embedding of a text, from the text tower of a CLIP or of a SigLIP."""

import torch
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    PreTrainedConfig,
    PreTrainedModel,
    SiglipTextConfig,
    SiglipTextModel,
)

from .errors import UserError
from .pack_rows import pack_rows


def new_text_tower(config: PreTrainedConfig) -> CLIPTextModel | SiglipTextModel:
    """A text tower with random weights.

    Raises:
        UserError: a configuration of another kind.
    """
    if isinstance(config, CLIPTextConfig):
        return CLIPTextModel(config)
    if isinstance(config, SiglipTextConfig):
        return SiglipTextModel(config)
    raise UserError(f"the text tower must be a clip_text_model or a siglip_text_model, got a {config.model_type}.")


def text_width(config: PreTrainedConfig) -> int:
    """Width of what `pooled_texts` gives: SigLIP's tower ends in a head of its own, CLIP's does not."""
    if isinstance(config, SiglipTextConfig) and config.projection_size is not None:
        return config.projection_size
    return config.hidden_size


def fixed_text_length(config: PreTrainedConfig) -> int | None:
    """Tokens that every text has to be padded to; None where each may have its own length."""
    return config.max_position_embeddings if isinstance(config, SiglipTextConfig) else None


def pooled_texts(text_tower: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """`(n, text_width)` of `input_ids, attention_mask (n, T)`, pooled as the tower was trained.

    CLIP: the state of the last token that the mask shows, its end token. SigLIP: the head on the last position, padding
    or not; its texts are padded to one length, padding is seen by all, and the mask is not used. No row gives
    `(0, text_width)` that still has a gradient: under data parallelism the tower takes part in every step.

    Raises:
        UserError: texts of a SigLIP that are not padded to its length.
    """
    length = fixed_text_length(text_tower.config)
    if length is not None and len(input_ids) and input_ids.shape[1] != length:
        raise UserError(f"texts must be padded to the {length} tokens of this SigLIP, got {input_ids.shape[1]}.")
    if not len(input_ids):
        blank = input_ids.new_zeros(1, length or 1)
        return pooled_texts(text_tower, blank, torch.ones_like(blank))[:0]
    if length is not None:
        return text_tower(input_ids=input_ids).pooler_output
    return text_states(text_tower, input_ids, attention_mask)


def text_states(text_tower: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """`(n, width)` of `input_ids, attention_mask (n, T)`, padded on the right, each row ending in its end token.

    `CLIPTextModel`'s own pooling finds the end token by its id, and differently for id 2. No row gives `(0, width)`.
    Short texts share a row of the longest one's length: texts of regions are so unlike in length that padding would
    be most of the work. It stays one pass, whatever the texts are: under FSDP every process makes as many.
    """
    if not len(input_ids):
        return torch.zeros(0, text_tower.config.hidden_size, dtype=text_tower.dtype, device=input_ids.device)
    ends = attention_mask.sum(dim=1) - 1
    if isinstance(text_tower.config, CLIPTextConfig) and text_tower.config._attn_implementation == "sdpa":
        lengths = (ends + 1).tolist()
        rows = pack_rows(lengths, max(lengths))
        if len(rows) < len(lengths):
            return _packed_states(text_tower, input_ids, attention_mask.bool(), lengths, rows)
    states = text_tower(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
    return states[torch.arange(len(states), device=states.device), ends]


def _packed_states(
    text_tower: PreTrainedModel, ids: torch.Tensor, shown: torch.Tensor, lengths: list[int], rows: list[list[int]]
) -> torch.Tensor:
    """`text_states` of texts that lie behind each other in `rows`; each sees itself alone, from position 0 on."""
    width, first = max(lengths), [0] * len(lengths)  # of all rows; where each text begins, the rows end to end
    for number, row in enumerate(rows):
        place = number * width
        for text in row:
            first[text], place = place, place + lengths[text]
    begins = torch.tensor(first, device=ids.device)
    positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    numbers = torch.arange(len(ids), device=ids.device)[:, None].expand_as(ids)
    places = (begins[:, None] + positions)[shown]

    def in_rows(values: torch.Tensor, elsewhere: int) -> torch.Tensor:
        """`(rows, width)` of values `(n, T)` of the texts' tokens."""
        flat = values.new_full((len(rows) * width,), elsewhere)
        return flat.index_put((places,), values[shown]).unflatten(0, (len(rows), width))

    text = in_rows(numbers, -1)
    sees = (text[:, :, None] == text[:, None, :]).tril()[:, None]  # what is left of a row sees itself; nobody reads it
    states = text_tower(input_ids=in_rows(ids, 0), attention_mask=sees, position_ids=in_rows(positions, 0))
    return states.last_hidden_state.flatten(0, 1)[begins + shown.sum(dim=1) - 1]
