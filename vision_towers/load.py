"""Open a tower by name or path, and read regions out of it in one line."""

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel

from .describe import describe_tower, registered_towers
from .errors import UserError
from .rice_config import RiceVisionConfig
from .rice_model import RiceVisionModel
from .roi_model import RoiVisionModel

READOUTS = ("rice", "roi")
OWN_TYPES = ("rice_vision_model", "roi_vision_model")


def load_tower(
    name_or_path: str | Path, readout: str | None = None, *, dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """Open a vision tower and give it a region readout.

    One of our towers is opened as it is. A native checkpoint is lifted by its type: `mlcd_vision_model` becomes a
    `RiceVisionModel`, every other registered ViT a `RoiVisionModel`. A model with a vision part (CLIP, SigLIP) gives
    that part.

    Args:
        name_or_path: hub id or folder.
        readout: "rice" or "roi" to override the choice.
        dtype: of the weights; as saved when absent.
    Raises:
        UserError: nothing to open there, no such readout for this tower, or tensors missing from the checkpoint.
    """
    source = str(name_or_path)
    if readout is not None and readout not in READOUTS:
        raise UserError(f"readout must be one of {', '.join(READOUTS)}, got {readout!r}.")
    try:
        config = AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise UserError(f"no tower can be opened at {source!r}: {str(error).splitlines()[0]}") from error
    vision = config if config.model_type in (*OWN_TYPES, *registered_towers()) else config.get_vision_config()
    describe_tower(vision)  # says in one sentence when the type is unknown

    if vision.model_type in OWN_TYPES:
        model_class = {"rice_vision_model": RiceVisionModel, "roi_vision_model": RoiVisionModel}[vision.model_type]
        if readout not in (None, describe_tower(vision).region_readout):
            raise UserError(f"{source!r} is a {vision.model_type}; open its native tower to read it by {readout!r}.")
        return _load(model_class, source, vision, dtype)
    if vision.model_type == "mlcd_vision_model" and readout != "roi":
        return _load(RiceVisionModel, source, RiceVisionConfig.from_native(vision), dtype)
    if readout == "rice":
        raise UserError(f"readout 'rice' needs an mlcd_vision_model, and {source!r} is a {vision.model_type}.")
    return RoiVisionModel.from_native(_load(AutoModel, source, vision, dtype))


def _load(model_class, source: str, config: PreTrainedConfig, dtype: torch.dtype | None) -> PreTrainedModel:
    model, info = model_class.from_pretrained(
        source, config=config, dtype="auto" if dtype is None else dtype, output_loading_info=True
    )
    # transformers only warns and goes on with random tensors; a tower with a random part is worse than no tower.
    if info["missing_keys"] or info["mismatched_keys"]:
        absent = sorted([*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])])
        raise UserError(f"{source!r} lacks {len(absent)} tensors of a {config.model_type}, e.g. {absent[0]}.")
    return model.eval()


def encode_regions(
    tower: PreTrainedModel, pixel_values: torch.Tensor, boxes: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """Region embeddings of a batch of images with different numbers of boxes.

    Args:
        tower: from `load_tower`.
        pixel_values: `(B, 3, H, W)`.
        boxes: B tensors `(R_i, 4)`, xyxy in pixels of that `(H, W)` frame.
    Returns:
        B tensors `(R_i, region_dim)`, not normalised.
    """
    padded, counts = pad_boxes(boxes)
    output = tower(pixel_values, boxes=padded.to(pixel_values.device), region_counts=counts.to(pixel_values.device))
    return [embeds[:count] for embeds, count in zip(output.region_embeds, counts.tolist(), strict=True)]


def pad_boxes(boxes: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Stack B tensors `(R_i, 4)` into `(B, R_max, 4)` float32, zero padded, and `region_counts (B,)`."""
    counts = torch.tensor([len(rows) for rows in boxes], dtype=torch.long)
    padded = torch.zeros(len(boxes), int(counts.max()) if len(boxes) else 0, 4)
    for row, rows in enumerate(boxes):
        if len(rows):
            padded[row, : len(rows)] = torch.as_tensor(rows, dtype=torch.float32)
    return padded, counts
