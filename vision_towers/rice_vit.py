"""The RICE tower of LLaVA-OneVision-1.5 (`rice_vit`) as transformers' `mlcd_vision_model`, and back.

The two are one network (RICE, Sec. 4.3): `rice_vit` keeps query, key and value in one matrix, has no layer norm after
the last block, takes patches instead of pictures, and orders them by blocks of 2 x 2. Its published code cuts the class
tokens out of a packed batch at the places they had before they were put in, so that from the second picture on it
returns class tokens among the patches and loses as many patches. Here every picture is encoded by itself.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import MLCDVisionConfig, MLCDVisionModel
from transformers.utils.hub import cached_file

from .describe import side_of
from .errors import UserError

MODEL_TYPE = "rice_vit"
IMAGE_SIZE = 560  # of the released weights; the configuration has none, and rotary positions need none
MERGE = 2  # patches a side of the blocks that patches are ordered by
PREFIX = re.compile(r"^(?:model\.)?visual\.")
# rice_vit -> mlcd_vision_model; `#` is the number of a block.
NAMES = {
    "class_embedding": "embeddings.class_embedding",
    "class_pos_emb": "class_pos_emb",
    "patch_embed.proj.weight": "embeddings.patch_embedding.weight",
    "pre_layernorm.weight": "pre_layrnorm.weight",
    "pre_layernorm.bias": "pre_layrnorm.bias",
    **{
        f"blocks.#.{rice}.{kind}": f"encoder.layers.#.{mlcd}.{kind}"
        for rice, mlcd in {
            "norm1": "layer_norm1",
            "norm2": "layer_norm2",
            "attn.proj": "self_attn.out_proj",
            "mlp.fc1": "mlp.fc1",
            "mlp.fc2": "mlp.fc2",
        }.items()
        for kind in ("weight", "bias")
    },
}
BACK = {mlcd: rice for rice, mlcd in NAMES.items()}
QKV = ("q_proj", "k_proj", "v_proj")
# Of an MLCD: what stands in the fused matrix, the last layer norm, and numbers that are computed.
LEFT_OUT = {f"encoder.layers.#.self_attn.{part}.{kind}" for part in QKV for kind in ("weight", "bias")} | {
    "post_layernorm.weight",
    "post_layernorm.bias",
    "embeddings.position_ids",
    "vision_rotary_embedding.inv_freq",
}


def to_mlcd_state(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of a `rice_vit`, or of a whole LLaVA-OneVision-1.5, under the names of an `mlcd_vision_model`.

    The merger and the language model are left out. `post_layernorm` is not in a `rice_vit`; it becomes the identity up
    to normalisation (ones and zeros) unless the given tensors have one.

    Raises:
        UserError: a tensor of the tower that is not known.
    """
    found: dict[str, torch.Tensor] = {}
    whole = any(PREFIX.match(name) for name in state)
    for name, tensor in state.items():
        if whole and not PREFIX.match(name):
            continue
        name = PREFIX.sub("", name)
        pattern, number = _numbered(name)
        if name.startswith("merger."):
            continue
        if name.startswith("post_layernorm."):
            found[name] = tensor
        elif pattern in NAMES:
            found[NAMES[pattern].replace("#", number)] = tensor
        elif pattern in ("blocks.#.attn.qkv.weight", "blocks.#.attn.qkv.bias"):
            kind = name.rpartition(".")[2]
            for part, piece in zip(QKV, tensor.chunk(3), strict=True):
                found[f"encoder.layers.{number}.self_attn.{part}.{kind}"] = piece.contiguous()
        else:
            raise UserError(f"a {MODEL_TYPE} has no tensor {name!r}; these are weights of another tower.")
    if "post_layernorm.weight" not in found and "embeddings.class_embedding" in found:
        width = found["embeddings.class_embedding"]
        found |= {"post_layernorm.weight": torch.ones_like(width), "post_layernorm.bias": torch.zeros_like(width)}
    return found


def to_rice_vit_state(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of an `mlcd_vision_model`, from memory or from a file of either layout, under the names of a `rice_vit`,
    without a prefix; `post_layernorm` is left out.

    Raises:
        UserError: a tensor that is not known.
    """
    own = {name.removeprefix("vision_model."): tensor for name, tensor in state.items()}
    found: dict[str, torch.Tensor] = {}
    for name, tensor in own.items():
        pattern, number = _numbered(name)
        kind = name.rpartition(".")[2]
        if pattern in BACK:
            found[BACK[pattern].replace("#", number)] = tensor
        elif pattern == f"encoder.layers.#.self_attn.q_proj.{kind}":
            parts = [own[name.replace("q_proj", part)] for part in QKV]
            found[f"blocks.{number}.attn.qkv.{kind}"] = torch.cat(parts)
        elif pattern not in LEFT_OUT:
            raise UserError(f"an mlcd_vision_model has no tensor {name!r}; these are weights of another tower.")
    return found


def merge_order(grid_hw: tuple[int, int]) -> torch.Tensor:
    """`(rows * columns,)`: where a `rice_vit` takes its tokens from in the row by row order of an MLCD.

    Raises:
        UserError: a grid of an odd number of rows or columns.
    """
    rows, columns = grid_hw
    if rows % MERGE or columns % MERGE:
        raise UserError(f"a {MODEL_TYPE} takes an even number of rows and columns of patches, got {rows} x {columns}.")
    blocks = torch.arange(rows * columns).view(rows // MERGE, MERGE, columns // MERGE, MERGE)
    return blocks.permute(0, 2, 1, 3).flatten()


def encode_packed(
    tower: MLCDVisionModel, patches: torch.Tensor, grids: Sequence[tuple[int, int]]
) -> list[torch.Tensor]:
    """What a `rice_vit` gives its merger, for pictures of any sizes in one tensor.

    Args:
        tower: from `load_rice_vit` (or any `mlcd_vision_model`).
        patches: `(sum of rows * columns, 3 * patch * patch)`, normalised, each picture's in the order of 2 x 2 blocks.
        grids: rows and columns of each picture, or frame.
    Returns:
        One `(rows * columns, hidden_size)` a picture, in the same order, without class token; the last block's output.
    Raises:
        UserError: grids that do not add up to the patches.
    """
    sizes = [rows * columns for rows, columns in grids]
    if sum(sizes) != len(patches):
        raise UserError(f"the grids {list(grids)} hold {sum(sizes)} patches, and {len(patches)} are given.")
    side = side_of(tower.config.patch_size)
    outputs = []
    for given, (rows, columns) in zip(patches.split(sizes), grids, strict=True):
        order = merge_order((rows, columns)).to(given.device)
        by_row = torch.empty_like(given)
        by_row[order] = given
        picture = by_row.view(rows, columns, 3, side, side).permute(2, 0, 3, 1, 4)
        tokens = tower(picture.reshape(1, 3, rows * side, columns * side)).last_hidden_state
        outputs.append(tokens[0, 1:][order])
    return outputs


class RiceVitConfig(MLCDVisionConfig):
    """The configuration of an MLCD whose weights lie in a `rice_vit`."""


def rice_vit_config(fields: Mapping[str, Any]) -> RiceVitConfig | None:
    """The tower in the fields of a config.json, of a `rice_vit` alone or of a model with one; None for other towers."""
    part = fields.get("vision_config") or fields
    if not isinstance(part, Mapping) or part.get("model_type") != MODEL_TYPE:
        return None
    return RiceVitConfig(  # a file may leave out what is as in its own class: the sizes of the released tower
        hidden_size=part.get("embed_dim") or part.get("hidden_size", 1024),  # both are the tower's width
        num_hidden_layers=part.get("depth", 24),
        num_attention_heads=part.get("num_heads", 16),
        intermediate_size=part.get("intermediate_size", 4096),
        patch_size=part.get("patch_size", 14),
        hidden_act=part.get("hidden_act", "gelu"),
        layer_norm_eps=part.get("layer_norm_eps", 1e-5),
        image_size=part.get("image_size", IMAGE_SIZE),
    )


def load_rice_vit(source: str, config: RiceVitConfig, dtype: torch.dtype | None = None) -> MLCDVisionModel:
    """Open the tower of a LLaVA-OneVision-1.5, or a `rice_vit` alone, as a native MLCD. The language model's tensors
    are not read.

    Args:
        source: folder or hub id with safetensors. config: from `rice_vit_config`. dtype: as saved when absent.
    Raises:
        UserError: no weights there, or not those of a whole tower.
    """
    native = MLCDVisionConfig(**{name: value for name, value in config.to_dict().items() if name != "model_type"})
    state = to_mlcd_state(_visual_tensors(source))
    with torch.device("meta"):
        wanted = {name: tensor.shape for name, tensor in MLCDVisionModel(native).state_dict().items()}
    absent = sorted(name for name, shape in wanted.items() if name not in state or state[name].shape != shape)
    if absent:
        raise UserError(f"{source!r} lacks {len(absent)} tensors of a {MODEL_TYPE}, or has others, e.g. {absent[0]}.")
    saved = state["embeddings.patch_embedding.weight"].dtype
    model: Any = MLCDVisionModel._from_config(native, dtype=dtype or saved)
    model.load_state_dict(state)
    return model.eval()


def _visual_tensors(source: str) -> dict[str, torch.Tensor]:
    try:
        index = cached_file(source, "model.safetensors.index.json", _raise_exceptions_for_missing_entries=False)
        names: dict[str, str] = {} if index is None else json.loads(Path(index).read_text())["weight_map"]
        files = {file for name, file in names.items() if PREFIX.match(name)} or set(names.values())
        paths = [cached_file(source, file) for file in sorted(files or {"model.safetensors"})]
    except OSError as error:
        raise UserError(f"no weights can be opened at {source!r}: {str(error).splitlines()[0]}") from error
    found = {}
    for path in paths:
        with safe_open(str(path), "pt") as file:
            held = list(file.keys())
            whole = any(PREFIX.match(name) for name in held)
            found |= {name: file.get_tensor(name) for name in held if not whole or PREFIX.match(name)}
    return found


def _numbered(name: str) -> tuple[str, str]:
    """A name with the number of its block as `#`, and that number."""
    match = re.match(r"(blocks|encoder\.layers)\.(\d+)\.", name)
    return (name, "") if match is None else (f"{match[1]}.#.{name[match.end() :]}", match[2])
