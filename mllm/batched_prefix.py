"""The beginnings of prompts: the picture and the words that all questions about it start with."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from .batched_cache import Layers, run, stack, take
from .batched_reader import EncodedPicture, Prompt, Reader


@dataclass(frozen=True)
class Prefix:
    """A picture's beginning: its ids, and their keys and values in every layer."""

    ids: list[int]
    layers: Layers
    picture: EncodedPicture


def common_beginning(
    prompts: Sequence[Prompt], image_token_id: int, region_token_id: int | None, kept: Prefix | None = None
) -> int:
    """How many ids all these prompts (and a kept prefix) share before any of them names a region or ends.

    An embedded region is another one in each prompt, whatever its id; and the last id of a question has to be run with
    the question, for what it predicts.
    """
    rows = [prompt.ids for prompt in prompts] + ([kept.ids] if kept is not None else [])
    columns = enumerate(zip(*rows, strict=False))
    shared = next((index for index, ids in columns if len(set(ids)) > 1), min(map(len, rows)))
    for prompt in prompts:
        shared = min(shared, prompt.split - 1)
        if region_token_id is not None and region_token_id in prompt.ids[:shared]:
            shared = prompt.ids.index(region_token_id)
    first = prompts[0].ids
    assert image_token_id not in first[shared:], "a chat template put a question before its picture"
    return shared


def compute_prefixes(
    model: Any, reader: Reader, pictures: dict[str, EncodedPicture], beginnings: dict[str, list[int]]
) -> dict[str, Prefix]:
    """The prefixes of pictures, all those of one length in one pass.

    Args:
        beginnings: for each picture the ids of its prefix.
    """
    found: dict[str, Prefix] = {}
    for length in dict.fromkeys(len(ids) for ids in beginnings.values()):
        keys = [key for key, ids in beginnings.items() if len(ids) == length]
        ids = torch.tensor([beginnings[key] for key in keys], device=model.device)
        rows = torch.cat([pictures[key].rows for key in keys])
        _, layers = run(model.model.language_model, embed(model, ids, {reader.image_token_id: rows}), None)
        for row, key in enumerate(keys):
            found[key] = Prefix(beginnings[key], take(layers, row, length), pictures[key])
    return found


def cut(prefix: Prefix, length: int) -> Prefix:
    """Its first ids alone."""
    return prefix if len(prefix.ids) == length else replace(prefix, ids=prefix.ids[:length])


def continue_prefixes(
    model: Any, prefixes: Sequence[Prefix], ids: Sequence[list[int]], region_rows: torch.Tensor, reader: Reader
) -> tuple[torch.Tensor, Layers]:
    """Run what follows the prefixes (all of one length), padded on the right.

    Args:
        ids: for each prefix the ids behind it.
        region_rows: embeddings of their region placeholders, flat, in their order.
    Returns:
        The hidden states of the new ids, and the layers of everything.
    """
    longest = max(len(row) for row in ids)
    before = stack([prefix.layers for prefix in prefixes], len(prefixes[0].ids))
    if not longest:
        return torch.empty(len(ids), 0, 0, device=model.device), before
    # Nothing looks at the padding: any id will do that is no placeholder.
    padded = torch.tensor([row + [0] * (longest - len(row)) for row in ids], device=model.device)
    fillings = {} if reader.region_token_id is None else {reader.region_token_id: region_rows}
    return run(model.model.language_model, embed(model, padded, fillings), before)


def embed(model: Any, ids: torch.Tensor, fillings: dict[int, torch.Tensor]) -> torch.Tensor:
    """Embeddings `(rows, tokens, width)` of ids, placeholders filled with the given rows, flat, in their order."""
    embeds = model.get_input_embeddings()(ids)
    for token_id, rows in fillings.items():
        mask = ids == token_id
        assert int(mask.sum()) == len(rows), f"{int(mask.sum())} placeholders for {len(rows)} embeddings"
        embeds = embeds.masked_scatter(mask[..., None], rows.to(embeds.device, embeds.dtype))
    return embeds
