"""What the files of a model hold before a swap and after it."""

import torch
from safetensors.torch import load_file

from regiontower.mllm.checkpoint import memory_name

REPLACED = ("model.vision_tower.", "model.multi_modal_projector.", "model.region_projector.")


def tensors_of(folder) -> dict[str, torch.Tensor]:
    """Every tensor in a folder's files, by its name in memory."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= {memory_name(name): tensor for name, tensor in load_file(file).items()}
    return found


def language_of(folder) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors_of(folder).items() if not name.startswith(REPLACED)}
