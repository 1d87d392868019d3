"""Give the weights back to plain transformers."""

from pathlib import Path

from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
from transformers.models.llava.image_processing_llava import LlavaImageProcessor

from ..vision_towers import UserError
from .modeling import RegionLlavaForConditionalGeneration
from .processing import RegionLlavaProcessor

OWN_FIELDS = ("model_type", "architectures", "region_token_index", "projector", "image_position", "row_end")


def to_plain_llava(
    model: RegionLlavaForConditionalGeneration, processor: RegionLlavaProcessor, out: str | Path
) -> Path:
    """Write a checkpoint that `LlavaForConditionalGeneration` opens without this package.

    Regions are left behind; everything else gives the same logits. The plain processor pads to a square before it
    resizes, so its pixels differ from ours by interpolation at the picture's edge.

    Raises:
        UserError: image tokens that plain LLaVA cannot make (`merge2x2_mlp`, `sin2d` or row ends).
    """
    config = model.config
    if not config.plain_exportable:
        choices = f"projector {config.projector}, image_position {config.image_position}, row_end {config.row_end}"
        raise UserError(f"plain LLaVA cannot run this model ({choices}); it needs mlp, none and false.")
    native = model.model.vision_tower.to_native()
    fields = {name: value for name, value in config.to_dict().items() if name not in OWN_FIELDS}
    plain_config = LlavaConfig(**fields | {"vision_config": native.config, "text_config": config.text_config})
    plain = LlavaForConditionalGeneration._from_config(plain_config, dtype=model.dtype)
    plain.model.vision_tower = native
    state = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if not name.startswith(("model.vision_tower.", "model.region_projector."))
    }
    info = plain.load_state_dict(state, strict=False)
    assert not info.unexpected_keys and all("vision_tower" in key for key in info.missing_keys), info
    plain.generation_config = model.generation_config

    side = processor.image_size
    image_processor = LlavaImageProcessor(
        do_pad=True,
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        image_mean=processor.image_processor.image_mean,
        image_std=processor.image_processor.image_std,
    )
    out = Path(out)
    plain.save_pretrained(out)
    LlavaProcessor(
        image_processor,
        processor.tokenizer,
        patch_size=processor.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=1 if config.vision_feature_select_strategy == "default" else 0,
        chat_template=processor.chat_template,
    ).save_pretrained(out)
    return out
