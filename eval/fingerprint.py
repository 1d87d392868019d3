"""What an answer depends on, as a hash: weights, configuration, processor."""

import hashlib
import json
from typing import Any

import torch

# Fields that say where a model came from, not what it answers.
_PROVENANCE = {"_name_or_path", "transformers_version", "name_or_path"}


def weights_hash(model: torch.nn.Module) -> str:
    """SHA-256 over every parameter and buffer of the state dict: name, dtype, shape, bytes.

    It names the weights as they run: the same file loaded as bfloat16 and as float32 has two hashes.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if not isinstance(tensor, torch.Tensor):
            continue
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        # Through bytes: numpy has no bfloat16.
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def checkpoint_id(weights: str, model: Any, processor: Any) -> str:
    """SHA-256 over `weights`, the configurations of model and processor, and the tokenizer: another box format, image
    size or chat template is another checkpoint. Where the folder lies does not matter."""
    parts: list[Any] = [weights]
    for owner in (getattr(model, "config", None), processor):
        to_dict = getattr(owner, "to_dict", None)
        parts.append(_without_provenance(to_dict()) if to_dict else None)
    tokenizer = getattr(processor, "tokenizer", None)
    if tokenizer is not None:
        parts.append([getattr(processor, "chat_template", None), tokenizer.chat_template, tokenizer.get_vocab()])
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def _without_provenance(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _without_provenance(item) for key, item in value.items() if key not in _PROVENANCE}
    if isinstance(value, list | tuple):
        return [_without_provenance(item) for item in value]
    return value
