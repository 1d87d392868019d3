"""Open a trained model, wherever its weights lie, on the device and in the precision asked for."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoProcessor

from ..vision_towers import UserError
from ..vision_towers.errors import CANNOT_OPEN, in_one_line
from ..vision_towers.packaged import model_source
from .adapters import adapter_base, attach_adapter, check_base, merge_adapter
from .modeling import RegionLlavaForConditionalGeneration
from .next_modeling import RegionLlavaNextForConditionalGeneration
from .processing import RegionLlavaProcessor
from .quantize import check_odd_layers, quantization
from .register import CLASSES

RegionMLLM = RegionLlavaForConditionalGeneration | RegionLlavaNextForConditionalGeneration
MODELS: dict[type, Any] = {config: model for config, model, _ in CLASSES}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def load_mllm(
    name_or_path: str | Path, *, device: str = "auto", dtype: str = "auto", quant: str = "none", merge: bool = False
) -> tuple[RegionMLLM, RegionLlavaProcessor]:
    """Open a RegionLlava or RegionLlavaNext checkpoint and its processor, ready to answer (eval mode).

    Args:
        name_or_path: a packaged model, a run directory (also one of LoRA: its base is opened, too), any folder written
            by `save_pretrained`, or a hub id.
        device: "auto" (CUDA, then MPS, then CPU), "cpu", "cuda", "cuda:N" or "mps".
        dtype: "auto" (as saved), "fp32", "bf16" or "fp16".
        quant: "none", or the language model's weights in "int8" or "nf4"; tower and projectors stay as they are.
        merge: add the adapter of a LoRA run to its base's weights; without it the layers keep it apart.
    Raises:
        UserError: nothing to open there, another kind of model, missing tensors, no such device, or an adapter whose
            base is gone or another model.
    """
    source = model_source(name_or_path)
    here = Path(source).is_dir()
    base = adapter_base(source) if here else None
    config = None
    if base is None:
        try:
            config = AutoConfig.from_pretrained(source)
        except CANNOT_OPEN as error:
            base = None if here else adapter_base(source)
            if base is None:
                raise UserError(f"no model can be opened at {source!r}: {in_one_line(error)}") from error
    if base is not None:
        check_base(source, base)
        if quant != "none" and adapter_base(model_source(base.path)) is not None:
            raise UserError(f"{source!r} is an adapter of an adapter; quantize what `export --merge` makes of it.")
        model, _ = load_mllm(base.path, device=device, dtype=dtype, quant=quant, merge=True)
        attach_adapter(model, source, quant)
        if merge:
            merge_adapter(model)
        return model.eval(), AutoProcessor.from_pretrained(source)
    if type(config) not in MODELS:
        found = getattr(config, "model_type", "model without a config")
        raise UserError(f"{source!r} is a {found}; this needs a region_llava, as align and instruct write.")
    if dtype not in ("auto", *DTYPES):
        raise UserError(f"dtype must be auto, {', '.join(DTYPES)}; got {dtype!r}.")
    place = torch.device(resolve_device(device))
    wanted: Any = DTYPES.get(dtype, "auto")
    options: dict[str, Any] = {}
    if quant != "none":
        compute = torch.float32 if dtype == "auto" and place.type == "cpu" else DTYPES.get(dtype, torch.bfloat16)
        options = {"quantization_config": quantization(quant, compute), "device_map": {"": place}}
        wanted = compute
    loaded: Any = MODELS[type(config)].from_pretrained(
        source, config=config, dtype=wanted, output_loading_info=True, **options
    )
    model, info = loaded
    check_loaded(source, info)
    processor = AutoProcessor.from_pretrained(source)
    check_odd_layers(model)
    return (model if options else model.to(place)).eval(), processor


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
