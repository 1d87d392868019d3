"""A model for others: an adapter merged into its base, or the weights given back to plain transformers."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    LlavaProcessor,
)
from transformers.models.llava.image_processing_llava import LlavaImageProcessor

from ..vision_towers import UserError, describe_tower
from ..vision_towers.lift import same_tokens
from ..vision_towers.packaged import model_source
from .adapters import adapter_base
from .config import RegionLlavaConfig
from .load import DTYPES, RegionMLLM, load_mllm
from .processing import RegionLlavaProcessor
from .swap import REGION_PROJECTOR, TOWER, adopt

OWN_FIELDS = ("model_type", "architectures", "region_token_index", "projector", "image_position", "row_end")
_PLAIN: dict[str, tuple[Any, Any, Any]] = {
    "region_llava": (LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor),
    "region_llava_next": (LlavaNextConfig, LlavaNextForConditionalGeneration, LlavaNextProcessor),
}


def export_merged(source: str | Path, out: str | Path, *, dtype: str = "auto") -> Path:
    """Write the model that a LoRA run makes of its base, as one checkpoint that needs neither of the two.

    The sum is made in float32. In float32 its greedy answers are those of the adapter beside its base.

    Args:
        source: a LoRA run directory, or the hub id of one. out: a new or empty folder.
        dtype: of the files: "fp32", "bf16", "fp16", or "auto", the one that the base is saved in.
    Raises:
        UserError: no adapter lies there, its base is gone or another model, or no such dtype.
    """
    if dtype not in ("auto", *DTYPES):
        raise UserError(f"--dtype must be auto, {', '.join(DTYPES)}; got {dtype!r}.")
    source = model_source(source)
    base = adapter_base(source)
    if base is None:
        raise UserError(f"{source} holds no adapter: there is nothing to merge.")
    while (below := adapter_base(model_source(base.path))) is not None:
        base = below
    saved: Any = AutoConfig.from_pretrained(model_source(base.path)).dtype
    model, processor = load_mllm(source, device="cpu", dtype="fp32", merge=True)
    out = Path(out)
    model.to(DTYPES.get(dtype, saved or torch.float32)).save_pretrained(out)  # pyright: ignore[reportArgumentType]
    processor.save_pretrained(out)
    return out


def to_plain_llava(model: RegionMLLM, processor: RegionLlavaProcessor, out: str | Path) -> Path:
    """Write a checkpoint that plain transformers opens, as a Llava or (of a RegionLlavaNext) a LlavaNext.

    Regions are left behind; everything else gives the same logits. The plain processor of a Llava pads to a square
    before it resizes, so its pixels differ from ours by interpolation at the picture's edge; a LlavaNext's are ours.

    Raises:
        UserError: image tokens that plain LLaVA cannot make (`merge2x2_mlp`, `sin2d`, row ends, or those of a tower
            with registers).
    """
    config = model.config
    if isinstance(config, RegionLlavaConfig) and not config.plain_exportable:
        choices = f"projector {config.projector}, image_position {config.image_position}, row_end {config.row_end}"
        raise UserError(f"plain LLaVA cannot run this model ({choices}); it needs mlp, none and false.")
    tower = model.model.vision_tower
    if not same_tokens(tower):
        raise UserError(
            "plain LLaVA would see other image tokens (this tower leaves registers out, or merges tokens); use --as "
            "remote-code."
        )
    native = tower.to_native()
    plain_config_kind, plain_kind, plain_processor = _PLAIN[config.model_type]
    fields = {name: value for name, value in config.to_dict().items() if name not in OWN_FIELDS}
    plain_config = plain_config_kind(**fields | {"vision_config": native.config, "text_config": config.text_config})
    plain_config.dtype = model.dtype
    with torch.device("meta"):  # a frame for the tensors that are there already
        plain: Any = plain_kind(plain_config)
    adopt(plain.model, model.model, leave=(TOWER, REGION_PROJECTOR))
    plain.model.vision_tower, plain.lm_head = native, model.lm_head
    plain.generation_config = model.generation_config

    side, image_processor = processor.image_size, processor.image_processor
    if isinstance(config, RegionLlavaConfig):
        image_processor = LlavaImageProcessor(
            do_pad=True,
            size={"shortest_edge": side},
            crop_size={"height": side, "width": side},
            image_mean=image_processor.image_mean,
            image_std=image_processor.image_std,
        )
    out = Path(out)
    plain.save_pretrained(out)
    plain_processor(
        image_processor,
        processor.tokenizer,
        patch_size=processor.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=describe_tower(native.config).num_prefix_tokens,
        chat_template=processor.chat_template,
    ).save_pretrained(out)
    return out
