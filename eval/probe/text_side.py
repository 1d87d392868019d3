"""The text side of a tower that was trained with one: what zero-shot probes need."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModel, CLIPTextModel, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ...train_stages.pretrain_data import CaptionTokens
from ...train_stages.pretrain_heads import CLIP_HEADS_FILE, TEXT_TOWER_FOLDER
from ...train_stages.region_labels import open_tokenizer
from ...vision_towers import ClocConfig, ClocModel, RoiVisionModel, load_tower
from ...vision_towers.packaged import model_source
from ...vision_towers.text_tower import text_states

TEXTS_AT_ONCE = 256


@dataclass(frozen=True)
class TextSide:
    """Maps into the space that texts, images and regions share; nothing in it is normalised.

    texts: `(n, J)` of n texts. images: `(B, J)` of normalised pixels `(B, 3, H, W)`. regions: for each readout that
    lies in the space the map `(R, D) -> (R, J)` of its embeddings. locate: boxes `(T, 4)` in input pixels of texts
    `(T, J)` in one image `(1, 3, H, W)`; None for towers that take no text prompts.
    """

    texts: Callable[[Sequence[str]], Tensor]
    images: Callable[[Tensor], Tensor]
    regions: Mapping[str, Callable[[Tensor], Tensor]]
    locate: Callable[[Tensor, Tensor], Tensor] | None = None


def open_with_texts(name_or_path: str | Path, device: str = "cpu") -> tuple[PreTrainedModel, TextSide | None]:
    """The tower at `name_or_path` in float32, and its text side when one was saved with it: a finished `pretrain` run
    of the cloc or the clip objective. Raises UserError as `load_tower` does."""
    source = model_source(name_or_path)
    tower: Any = load_tower(source, dtype=torch.float32)
    folder = Path(source)
    if (folder / CLIP_HEADS_FILE).is_file():
        tower.to(device)
        return tower, _clip_side(tower, folder)
    if folder.is_dir() and PreTrainedConfig.get_config_dict(source)[0].get("model_type") == ClocConfig.model_type:
        model: Any = AutoModel.from_pretrained(source, dtype=torch.float32).eval().to(device)
        return model.vision_tower, _cloc_side(model, open_tokenizer(source))
    return tower.to(device), None


def _cloc_side(model: ClocModel, tokenizer: PreTrainedTokenizerBase) -> TextSide:
    most = model.text_tower.config.max_position_embeddings
    return TextSide(
        texts=_texts(model.encode_texts, tokenizer, most, model.device),
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
    tokenizer = open_tokenizer(folder / TEXT_TOWER_FOLDER)
    return TextSide(
        texts=_texts(encode, tokenizer, text_tower.config.max_position_embeddings, tower.device),
        images=lambda pixels: project(tower(pixels).pooler_output),
        regions=dict.fromkeys(readouts, project),
    )


def _texts(
    encode: Callable[[Tensor, Tensor], Tensor], tokenizer: PreTrainedTokenizerBase, most: int, device: torch.device
) -> Callable[[Sequence[str]], Tensor]:
    tokens = CaptionTokens(tokenizer, most)

    @torch.inference_mode()
    def embed(texts: Sequence[str]) -> Tensor:
        found = []
        for start in range(0, len(texts), TEXTS_AT_ONCE):
            ids, mask = tokens.pad([tokens(text) for text in texts[start : start + TEXTS_AT_ONCE]])
            found.append(encode(ids.to(device), mask.to(device)).float())
        return torch.cat(found)

    return embed
