"""Open a trained model, wherever its weights lie, on the device and in the precision asked for."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoProcessor

from ..vision_towers import UserError
from ..vision_towers.packaged import model_source
from .config import RegionLlavaConfig
from .modeling import RegionLlavaForConditionalGeneration
from .processing import RegionLlavaProcessor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def load_mllm(
    name_or_path: str | Path, *, device: str = "auto", dtype: str = "auto"
) -> tuple[RegionLlavaForConditionalGeneration, RegionLlavaProcessor]:
    """Open a RegionLlava checkpoint and its processor, ready to answer (eval mode).

    Args:
        name_or_path: a packaged model, a run directory, any folder written by `save_pretrained`, or a hub id.
        device: "auto" (CUDA, then MPS, then CPU), "cpu", "cuda", "cuda:N" or "mps".
        dtype: "auto" (as saved), "fp32", "bf16" or "fp16".
    Raises:
        UserError: nothing to open there, another kind of model, missing tensors, or no such device.
    """
    source = model_source(name_or_path)
    try:
        config = AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise UserError(f"no model can be opened at {source!r}: {str(error).splitlines()[0]}") from error
    if not isinstance(config, RegionLlavaConfig):
        raise UserError(f"{source!r} is a {config.model_type}; this needs a region_llava, as align and instruct write.")
    if dtype not in ("auto", *DTYPES):
        raise UserError(f"dtype must be auto, {', '.join(DTYPES)}; got {dtype!r}.")
    loaded: Any = RegionLlavaForConditionalGeneration.from_pretrained(
        source, config=config, dtype=DTYPES.get(dtype, "auto"), output_loading_info=True
    )
    model, info = loaded
    check_loaded(source, info)
    processor = AutoProcessor.from_pretrained(source)
    return model.to(torch.device(resolve_device(device))).eval(), processor


def check_loaded(source: str, info: dict) -> None:
    """Refuse what transformers only warns of: a checkpoint that fills a part of the model with random numbers."""
    absent = sorted([*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])])
    if absent:
        raise UserError(f"{source!r} lacks {len(absent)} tensors of the model, e.g. {absent[0]}; it cannot be used.")


def resolve_device(device: str) -> str:
    """ "auto" -> the best device here; anything else is checked."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise UserError(f"device must be auto, cpu, cuda, cuda:N or mps; got {device!r}.") from error
    present = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not present.get(kind, False):
        raise UserError(f"device {device!r} is not available on this machine; use --device auto or cpu.")
    return device
