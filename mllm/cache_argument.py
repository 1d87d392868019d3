"""What models and `generate` call the KV cache they are given: transformers renamed it in 5.24."""

import inspect
from typing import Any

from transformers import Cache, LlamaModel

_NAME = "cache" if "cache" in inspect.signature(LlamaModel.forward).parameters else "past_key_values"


def cache_argument(cache: Cache) -> dict[str, Any]:
    """The keyword argument that hands `cache` over."""
    return {_NAME: cache}
