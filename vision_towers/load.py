"""Open a tower by name or path, and read regions out of it in one line."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModel,
    CLIPModel,
    MLCDVisionConfig,
    PreTrainedConfig,
    PreTrainedModel,
    SiglipModel,
)
from transformers.utils import logging

from .cloc_model import ClocModel
from .describe import describe_tower, registered_towers
from .errors import CANNOT_OPEN, UserError, in_one_line
from .lift import lift_tower
from .packaged import model_source
from .region_boxes import HALF_PRECISION
from .rice_config import RiceVisionConfig
from .rice_model import RiceVisionModel
from .rice_vit import RiceVitConfig, load_rice_vit, rice_vit_config
from .roi_model import RoiVisionModel
from .umg_clip_model import UmgClipModel

READOUTS = ("rice", "roi")
# Where the tower stands in a LLaVA, in the layout of files and in that of memory.
IN_LLAVA = {r"^(?:model\.)?vision_tower\.(?:vision_model\.)?": ""}


def load_tower(
    name_or_path: str | Path, readout: str | None = None, *, dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """Open a vision tower and give it a region readout.

    A tower with a readout of its own (ours, or one added by `register_tower`) is opened as it is. A native checkpoint
    is lifted by its type: `mlcd_vision_model` becomes a `RiceVisionModel`, every other registered ViT a
    `RoiVisionModel`. A model with a vision part (CLIP, SigLIP) gives that part; the `rice_vit` of a
    LLaVA-OneVision-1.5 becomes a `RiceVisionModel`.

    Args:
        name_or_path: hub id or folder. Only safetensors are read.
        readout: "rice" or "roi" to override the choice.
        dtype: of the weights; as saved when absent.
    Raises:
        UserError: nothing to open there, no such readout for this tower, or tensors missing from the checkpoint.
    """
    source = model_source(name_or_path)
    if readout is not None and readout not in READOUTS:
        raise UserError(f"readout must be one of {', '.join(READOUTS)}, got {readout!r}.")
    with _quietly(keep_bars=not Path(source).is_dir()):
        vision = tower_config(source)
        spec = describe_tower(vision)  # says in one sentence when the type is unknown
        if spec.region_readout != "none":
            if readout not in (None, spec.region_readout):
                raise UserError(
                    f"{source!r} is a {vision.model_type}, read by {spec.region_readout!r}; to read it by {readout!r} "
                    "save its to_native() model and open that."
                )
            return _load(AutoModel, source, vision, dtype)
        if isinstance(vision, RiceVitConfig):
            native = load_rice_vit(source, vision, dtype)
            return RoiVisionModel.from_native(native) if readout == "roi" else lift_tower(native)
        if isinstance(vision, MLCDVisionConfig) and readout != "roi":
            return _load(RiceVisionModel, source, RiceVisionConfig.from_native(vision), dtype)
        if readout == "rice":
            raise UserError(f"readout 'rice' needs an mlcd_vision_model, and {source!r} is a {vision.model_type}.")
        return RoiVisionModel.from_native(_load(AutoModel, source, vision, dtype))


def load_umg_clip(name_or_path: str | Path, *, dtype: torch.dtype | None = None, **region_fields) -> UmgClipModel:
    """Open a whole UMG-CLIP, or lift a native CLIP or SigLIP to one.

    Args:
        name_or_path: hub id or folder. Only safetensors are read.
        dtype: of the weights; as saved when absent.
        region_fields: those of `UmgClipVisionConfig`, for a native pair; a saved UMG-CLIP has its own.
    Raises:
        UserError: nothing to open there, a model of another kind, or tensors missing from the checkpoint.
    """
    source = model_source(name_or_path)
    kinds = {"umg_clip": UmgClipModel, "clip": CLIPModel, "siglip": SiglipModel}
    model = _load_whole(source, kinds, "a umg_clip, a clip or a siglip", dtype)
    if isinstance(model, UmgClipModel):
        return model
    return UmgClipModel.from_pair(model, **region_fields)


def load_cloc(name_or_path: str | Path, *, dtype: torch.dtype | None = None) -> ClocModel:
    """Open a whole CLOC: the tower with its Prompter, and the text tower.

    Args:
        name_or_path: hub id or folder. Only safetensors are read.
        dtype: of the weights; as saved when absent.
    Raises:
        UserError: nothing to open there, a model of another kind, or tensors missing from the checkpoint.
    """
    model = _load_whole(model_source(name_or_path), {"cloc": ClocModel}, "a cloc", dtype)
    assert isinstance(model, ClocModel)
    return model


def _load_whole(
    source: str, kinds: dict[str, type[PreTrainedModel]], needed: str, dtype: torch.dtype | None
) -> PreTrainedModel:
    """The model at `source` by its `model_type`, as it was saved. needed: the kinds, for the user."""
    with _quietly(keep_bars=not Path(source).is_dir()):
        try:
            config = AutoConfig.from_pretrained(source)
        except CANNOT_OPEN as error:
            raise UserError(f"no model can be opened at {source!r}: {in_one_line(error)}") from error
        kind = kinds.get(config.model_type)
        if kind is None:
            raise UserError(f"{source!r} is a {config.model_type}; {needed} is needed.")
        return _load(kind, source, config, dtype, key_mapping=None)


def tower_config(name_or_path: str | Path) -> PreTrainedConfig:
    """The configuration of the tower that `load_tower` opens there, or of the vision part of the model there, as it is
    saved. Weights are not read.

    Raises:
        UserError: nothing to open there.
    """
    source = model_source(name_or_path)
    try:
        fields, _ = PreTrainedConfig.get_config_dict(source)
        if (packed := rice_vit_config(fields)) is not None:
            return packed
        part = fields.get("vision_config")
        if isinstance(part, dict) and part.get("model_type") in registered_towers():
            # Read without the whole model's own class, which may be one that this package does not know.
            return AutoConfig.for_model(**part)
        config = AutoConfig.from_pretrained(source)
    except CANNOT_OPEN as error:
        raise UserError(f"no tower can be opened at {source!r}: {in_one_line(error)}") from error
    if type(config).model_type in registered_towers():
        return config
    part = getattr(config, "vision_config", None)
    return part if isinstance(part, PreTrainedConfig) else config


def _load(
    model_class,
    source: str,
    config: PreTrainedConfig,
    dtype: torch.dtype | None,
    key_mapping: dict[str, str] | None = IN_LLAVA,
) -> PreTrainedModel:
    try:
        model, info = model_class.from_pretrained(
            source,
            config=config,
            dtype="auto" if dtype is None else dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are named below, in one sentence instead of a table
            use_safetensors=True,
            key_mapping=key_mapping,
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"the weights at {source!r} cannot be opened: {in_one_line(error)}") from error
    # transformers only warns and goes on with random tensors; a tower with a random part is worse than no tower.
    absent = sorted(info["missing_keys"])
    if absent:
        raise UserError(f"{source!r} lacks {len(absent)} tensors of a {config.model_type}, e.g. {absent[0]}.")
    wrong = sorted(info["mismatched_keys"])
    if wrong:
        key, saved, wanted = wrong[0]
        raise UserError(
            f"{source!r} does not fit its config: {len(wrong)} tensors have another shape, e.g. {key} is "
            f"{tuple(saved)} and should be {tuple(wanted)}."
        )
    _forget(model, key_mapping or {})
    return model.eval()


def _forget(model: PreTrainedModel, key_mapping: dict[str, str]) -> None:
    """Save the model under its own names: transformers would turn the mapping round, and a pattern is no name."""
    used = getattr(model, "_weight_conversions", None)
    if used:
        own = [change for change in used if not set(change.source_patterns) & key_mapping.keys()]
        model._weight_conversions = own  # pyright: ignore


@contextmanager
def _quietly(keep_bars: bool) -> Iterator[None]:
    """Hold back transformers' report of a load (a bar, a table of keys): what matters in it is raised as an error.

    Args:
        keep_bars: leave progress bars on; a download may take minutes.
    """
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if not keep_bars:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


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
    Raises:
        UserError: boxes of the wrong shape or in half precision.
    """
    padded, counts = pad_boxes(boxes)
    output = tower(pixel_values, boxes=padded.to(pixel_values.device), region_counts=counts.to(pixel_values.device))
    return [embeds[:count] for embeds, count in zip(output.region_embeds, counts.tolist(), strict=True)]


def pad_boxes(boxes: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Stack B tensors `(R_i, 4)` into `(B, R_max, 4)` float32, zero padded, and `region_counts (B,)`.

    Raises:
        UserError: an image's boxes are not `(R_i, 4)`, or in half precision.
    """
    rows = [torch.as_tensor(given) for given in boxes]
    for index, given in enumerate(rows):
        if given.dtype in HALF_PRECISION:
            raise UserError(f"boxes of image {index} are {given.dtype}, which moves their edges; keep them float32.")
        if given.numel() and (given.ndim != 2 or given.shape[1] != 4):
            raise UserError(f"boxes of image {index} must be (R, 4) xyxy in pixels, got {tuple(given.shape)}.")
    counts = torch.tensor([len(given) for given in rows], dtype=torch.long)
    padded = torch.zeros(len(rows), int(counts.max()) if rows else 0, 4)
    for index, given in enumerate(rows):
        if len(given):
            padded[index, : len(given)] = given
    return padded, counts
