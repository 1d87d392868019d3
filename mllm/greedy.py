"""Greedy decoding of one text, a token at a time, on a KV cache that the caller keeps.

`generate` gets ready for batches, beams and sampling anew in every call, and hands tokens out only through another
thread. A turn of a conversation needs neither: here the caller asks for the next token, and stops by not asking.
"""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from transformers import Cache

from .cache_argument import cache_argument

BYTE_TOKEN = re.compile("<0x[0-9A-F]{2}>")


def greedy_tokens(
    model: Any,
    ids: torch.Tensor,
    cache: Cache,
    encoded: Mapping[str, Any],
    *,
    ends: Collection[int],
    max_new_tokens: int,
) -> Iterator[tuple[int, float]]:
    """New tokens, each with its probability before any was suppressed.

    The cache then holds everything but the last token that was yielded.

    Args:
        model: with its head; `generation_config.suppress_tokens` are never chosen.
        ids: `(1, n)`, what the cache does not hold yet; at least one.
        cache: grows by what is run.
        encoded: `mm_encoder_outputs` for the placeholders in `ids`.
        ends: ids that end the text; they are not yielded.
        max_new_tokens: most tokens yielded.
    """
    suppressed = torch.tensor(model.generation_config.suppress_tokens or [], dtype=torch.long, device=ids.device)
    for _ in range(max_new_tokens):
        token, probability = _next_token(model, ids, cache, encoded, suppressed)
        if token in ends:
            return
        yield token, probability
        ids, encoded = ids.new_tensor([[token]]), {}


def is_settled(tokenizer: Any, ids: Sequence[int], text: str) -> bool:
    """Whether `text`, what `ids` decode to, stays as it is whatever token comes next.

    Bytes may still become one character; and where a byte is a token, as sentencepiece's `<0xC3>` is, a run of them
    stands or falls as a whole.
    """
    return not text.endswith("\ufffd") and not BYTE_TOKEN.fullmatch(tokenizer.convert_ids_to_tokens(ids[-1]))


# Not around the generator: what a consumer does between two tokens is not ours to run in inference mode.
@torch.inference_mode()
def _next_token(
    model: Any, ids: torch.Tensor, cache: Cache, encoded: Mapping[str, Any], suppressed: torch.Tensor
) -> tuple[int, float]:
    output = model(
        input_ids=ids,
        use_cache=True,
        logits_to_keep=1,
        mm_encoder_outputs=dict(encoded) or None,
        **cache_argument(cache),
    )
    logits = output.logits[0, -1].float()
    token = int(logits.index_fill(0, suppressed, -torch.inf).argmax())
    return token, float(logits.softmax(-1)[token])
