"""Convpass: small convolutions beside the attention and the MLP of every block of a frozen ViT.

UMG-CLIP (arXiv 2401.06397) is tuned for its tasks with the backbone frozen; by which modules is not known to us. This
one is Jie & Deng's (2022). For the normalised tokens x that a block's attention or MLP reads, on their patch grid::

    x + MHSA(x)   becomes   x + MHSA(x) + s Up( GELU( Conv3x3( GELU( Down(x) ) ) ) )        and so for the MLP

Down: width -> h, Up: h -> width, both 1x1. CLS goes through as an image of 1 x 1 of its own. Up starts at 0, so a new
adapter changes nothing.
"""

import math
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import gelu
from transformers import PreTrainedModel

from .describe import describe_tower
from .errors import UserError

PLACES = ("self_attn", "mlp")


class Convpass(nn.Module):
    """The adapter of one attention or MLP, on tokens `(B, N, width)`: a square grid of patches, after CLS if the tower
    has one (`prefix` 1, or 0)."""

    def __init__(self, width: int, prefix: int, bottleneck: int = 8, scale: float = 1.0):
        super().__init__()
        self.prefix, self.scale = prefix, scale
        self.down = nn.Linear(width, bottleneck)
        self.conv = nn.Conv2d(bottleneck, bottleneck, 3, padding=1)
        self.up = nn.Linear(bottleneck, width)
        nn.init.dirac_(self.conv.weight)  # at the start every token stands alone (not in what we know of it; ours)
        for zero in (self.conv.bias, self.up.weight, self.up.bias):
            assert zero is not None
            nn.init.zeros_(zero)

    def forward(self, tokens: Tensor) -> Tensor:
        """What is added to the output of the module beside it.

        Raises:
            UserError: the patches are no square grid.
        """
        patches = tokens.shape[1] - self.prefix
        side = math.isqrt(patches)
        if side**2 != patches:
            raise UserError(f"a Convpass needs a square grid of patches, and the image has {patches}.")
        small = gelu(self.down(tokens)).transpose(1, 2)
        grid = self.conv(small[:, :, self.prefix :].unflatten(2, (side, side))).flatten(2)
        alone = [self.conv(small[:, :, :1, None])[..., 0]] if self.prefix else []
        return self.scale * self.up(gelu(torch.cat([*alone, grid], dim=2)).transpose(1, 2))


class _WithConvpass:
    """Mixed into the class of a native module: its output and its adapter's, of the same input."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        own: Any = super()
        found, beside = own.forward(hidden_states, *args, **kwargs), convpass_beside(self, hidden_states)
        return (found[0] + beside, *found[1:]) if isinstance(found, tuple) else found + beside


@cache
def _with_convpass(kind: type) -> type:
    # A subclass instead of a wrapper: the native module keeps the names of its weights and all its attributes.
    return type(f"{kind.__name__}WithConvpass", (_WithConvpass, kind), {})


def convpass_beside(module: Any, tokens: Tensor) -> Tensor | float:
    """What the adapter of an attention or MLP adds for these tokens; 0 where there is none."""
    adapter = getattr(module, "convpass", None)
    return 0.0 if adapter is None else adapter(tokens)


def add_convpass(tower: PreTrainedModel, bottleneck: int = 8, scale: float = 1.0) -> None:
    """Put adapters into every block of a native CLIP, SigLIP or MLCD, in place, and freeze all else in it.

    Args:
        bottleneck: h, 8 in the original. scale: s, which the original tunes for each task; 1 is ours.
    Raises:
        UserError: a tower without such blocks, or one that has adapters already.
    """
    layers = _layers(tower)
    if any(hasattr(module, "convpass") for layer in layers for module in _places(layer)):
        raise UserError("this tower has a Convpass already.")
    tower.requires_grad_(False)
    prefix = describe_tower(tower.config).num_prefix_tokens
    for layer in layers:
        for module in _places(layer):
            adapter = Convpass(tower.config.hidden_size, prefix, bottleneck, scale)
            module.convpass = adapter.to(tower.device, tower.dtype)
            module.__class__ = _with_convpass(type(module))


def save_convpass(tower: PreTrainedModel, path: str | Path) -> None:
    """The adapters alone, in one safetensors file.

    Raises:
        UserError: the tower has none.
    """
    first = getattr(_places(_layers(tower)[0])[0], "convpass", None)
    if first is None:
        raise UserError("this tower has no Convpass to save; see add_convpass.")
    state = {name: value.contiguous() for name, value in _adapters(tower).items()}
    save_file(state, path, {"bottleneck": str(first.down.out_features), "scale": repr(first.scale)})


def load_convpass(tower: PreTrainedModel, path: str | Path) -> None:
    """Put the adapters of a file of `save_convpass` into a tower that has none.

    Raises:
        UserError: no such file, one of other adapters, or adapters of another tower.
    """
    if not Path(path).is_file():
        raise UserError(f"there is no file {path}; it should hold the adapters of save_convpass.")
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            saved = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dict
    except SafetensorError as error:
        raise UserError(f"{path} is no safetensors file: {error}.") from error
    if not {"bottleneck", "scale"} <= about.keys():
        raise UserError(f"{path} holds no Convpass.")
    width = next((value.shape[1] for name, value in saved.items() if name.endswith("down.weight")), None)
    places = len(_layers(tower)) * len(PLACES)
    if width != tower.config.hidden_size or sum(name.endswith("down.weight") for name in saved) != places:
        raise UserError(f"the adapters in {path} are those of a tower of another width or depth.")
    add_convpass(tower, int(about["bottleneck"]), float(about["scale"]))
    with torch.no_grad():
        for name, value in _adapters(tower).items():
            value.copy_(saved[name])


def _layers(tower: Any) -> Any:
    layers = getattr(getattr(tower, "encoder", None), "layers", None)
    if not layers or not all(hasattr(layers[0], place) for place in PLACES):
        raise UserError(f"a Convpass is for a native CLIP, SigLIP or MLCD, and this is a {tower.config.model_type}.")
    return layers


def _places(layer: Any) -> list[Any]:
    return [getattr(layer, place) for place in PLACES]


def _adapters(tower: PreTrainedModel) -> dict[str, Tensor]:
    return {name: value for name, value in tower.state_dict().items() if ".convpass." in name}
