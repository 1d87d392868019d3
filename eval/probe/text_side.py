"""The text side of a tower that was trained with one: what zero-shot probes need."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    CLIPConfig,
    CLIPTextModel,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    SiglipConfig,
)

from ...train_stages.pretrain_data import CaptionTokens
from ...train_stages.pretrain_heads import CLIP_HEADS_FILE, TEXT_TOWER_FOLDER
from ...train_stages.region_labels import open_tokenizer
from ...vision_towers import (
    ClocConfig,
    ClocModel,
    RoiVisionModel,
    UmgClipConfig,
    UmgClipModel,
    UserError,
    load_cloc,
    load_tower,
    load_umg_clip,
)
from ...vision_towers.packaged import model_source
from ...vision_towers.text_tower import text_states

TEXTS_AT_ONCE = 256
PAIRS = (UmgClipConfig.model_type, CLIPConfig.model_type, SiglipConfig.model_type)


@dataclass(frozen=True)
class RegionTexts:
    """Maps into the space that texts and regions share; nothing in it is normalised.

    texts: `(n, J)` of n texts. regions: for each readout that lies in the space the map `(R, D) -> (R, J)` of its
    embeddings.
    """

    texts: Callable[[Sequence[str]], Tensor]
    regions: Mapping[str, Callable[[Tensor], Tensor]]


@dataclass(frozen=True)
class TextSide(RegionTexts):
    """The texts that a tower was trained with, whose space holds whole images, too.

    images: `(B, J)` of normalised pixels `(B, 3, H, W)`. locate: boxes `(T, 4)` in input pixels of texts `(T, J)` in
    one image `(1, 3, H, W)`; None for towers that take no text prompts.
    """

    images: Callable[[Tensor], Tensor]
    locate: Callable[[Tensor, Tensor], Tensor] | None = None


def open_with_texts(name_or_path: str | Path, device: str = "cpu") -> tuple[PreTrainedModel, TextSide | None]:
    """The tower at `name_or_path` in float32, and its text side when it has one: a finished `pretrain` run of the cloc,
    the clip or the umg_clip objective, or a native CLIP or SigLIP. The tower of the last three is a
    `UmgClipVisionModel`: a native pair is read by its dense features.

    Raises:
        UserError: as `load_tower`, or a model that needs its tokenizer beside it and has none.
    """
    source = model_source(name_or_path)
    folder = Path(source)
    if (folder / CLIP_HEADS_FILE).is_file():
        tower: Any = load_tower(source, dtype=torch.float32)
        tower.to(device)
        return tower, _clip_side(tower, folder)
    kind = _model_type(source)
    if kind == ClocConfig.model_type:
        model: Any = load_cloc(source, dtype=torch.float32)
        model.to(device)
        return model.vision_tower, _cloc_side(model, _tokenizer_beside(source))
    if kind in PAIRS:
        pair: Any = load_umg_clip(source, dtype=torch.float32)
        pair.to(device)
        return pair.vision_tower, _umg_clip_side(pair, _own_tokenizer(source, pair))
    alone: Any = load_tower(source, dtype=torch.float32)
    return alone.to(device), None


def _model_type(source: str) -> str | None:
    """What the configuration at `source` says; None where there is none, which `load_tower` explains."""
    try:
        return PreTrainedConfig.get_config_dict(source)[0].get("model_type")
    except (OSError, ValueError):
        return None


def _tokenizer_beside(source: str | Path) -> PreTrainedTokenizerBase:
    try:
        return open_tokenizer(source)
    except UserError as error:
        raise UserError(
            f"no tokenizer can be opened at '{source}'; save the one that its texts were trained with there."
        ) from error


def _own_tokenizer(source: str, pair: UmgClipModel) -> PreTrainedTokenizerBase:
    tokenizer, rows = _tokenizer_beside(source), pair.text_tower.config.vocab_size
    # Where no tokenizer was saved transformers answers with an empty one of the model's kind.
    if not rows / 2 <= len(tokenizer) <= rows:
        raise UserError(
            f"the tokenizer at {source!r} has {len(tokenizer)} tokens and the text tower {rows}; save the one it was "
            "trained with beside it."
        )
    return tokenizer


def _umg_clip_side(model: UmgClipModel, tokenizer: PreTrainedTokenizerBase) -> TextSide:
    most = model.text_tower.config.max_position_embeddings
    tokens = CaptionTokens(tokenizer, most, framed=True, length=model.text_length)
    vision: Any = model.vision_tower.config
    # A SigLIP without its head pools nothing: a crop has no embedding then.
    crops = ("crops",) if getattr(vision.tower_config, "vision_use_head", True) else ()
    return TextSide(
        texts=text_embedder(model.encode_texts, tokens, model.device),
        images=model.encode_images,
        regions=dict.fromkeys(("own", vision.pooling, *crops), model.image_projection),
    )


def _cloc_side(model: ClocModel, tokenizer: PreTrainedTokenizerBase) -> TextSide:
    most = model.text_tower.config.max_position_embeddings
    return TextSide(
        texts=text_embedder(model.encode_texts, CaptionTokens(tokenizer, most), model.device),
        images=model.encode_images,
        regions={"own": model.vision_tower.projection},
        locate=lambda pixels, texts: model.locate(pixels, texts[None])[0],
    )


def _clip_side(tower: Any, folder: Path) -> TextSide:
    text_tower: Any = CLIPTextModel.from_pretrained(folder / TEXT_TOWER_FOLDER, dtype=torch.float32).eval()
    text_tower.to(tower.device)
    heads = {name: value.to(tower.device).float() for name, value in load_file(folder / CLIP_HEADS_FILE).items()}

    def project(pooled: Tensor) -> Tensor:
        return pooled @ heads["image_projection"].T

    def encode(ids: Tensor, mask: Tensor) -> Tensor:
        return text_states(text_tower, ids, mask) @ heads["text_projection"].T

    # Readouts whose embeddings went through the layers that the pooled output went through. RoIAlign of an earlier
    # layer's tokens did not.
    readouts = ("value", "crops") if isinstance(tower, RoiVisionModel) else ("own", "value", "crops")
    tokens = CaptionTokens(_tokenizer_beside(folder / TEXT_TOWER_FOLDER), text_tower.config.max_position_embeddings)
    return TextSide(
        texts=text_embedder(encode, tokens, tower.device),
        images=lambda pixels: project(tower(pixels).pooler_output),
        regions=dict.fromkeys(readouts, project),
    )


def text_embedder(
    encode: Callable[[Tensor, Tensor], Tensor], tokens: CaptionTokens, device: torch.device
) -> Callable[[Sequence[str]], Tensor]:
    """Texts -> `(n, J)` float32, from `encode(input_ids, attention_mask)`, `(n, T)` each, on `device`."""

    @torch.inference_mode()
    def embed(texts: Sequence[str]) -> Tensor:
        found = []
        for start in range(0, len(texts), TEXTS_AT_ONCE):
            ids, mask = tokens.pad([tokens(text) for text in texts[start : start + TEXTS_AT_ONCE]])
            found.append(encode(ids.to(device), mask.to(device)).float())
        return torch.cat(found)

    return embed


def unit(rows: Tensor) -> Tensor:
    """Rows of length 1, float32, on the CPU."""
    return F.normalize(rows.float().cpu(), dim=-1)
