"""Make our models known to the Auto classes and to the checkpoint key maps of transformers."""

from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping

from .config import RegionLlavaConfig, RegionLlavaNextConfig
from .modeling import RegionLlavaForConditionalGeneration
from .next_modeling import RegionLlavaNextForConditionalGeneration
from .next_processing import RegionLlavaNextProcessor
from .processing import RegionLlavaProcessor

CLASSES = (
    (RegionLlavaConfig, RegionLlavaForConditionalGeneration, RegionLlavaProcessor),
    (RegionLlavaNextConfig, RegionLlavaNextForConditionalGeneration, RegionLlavaNextProcessor),
)
# Ours -> whose tensor names it shares.
NAMES = {
    "region_llava": "llava",
    "RegionLlavaModel": "LlavaModel",
    "region_llava_next": "llava_next",
    "RegionLlavaNextModel": "LlavaNextModel",
}


def register_all() -> None:
    """Register once, at import."""
    for config, model, processor in CLASSES:
        AutoConfig.register(config.model_type, config)
        AutoModelForImageTextToText.register(config, model)
        AutoProcessor.register(config, processor)
    # Without these a checkpoint in LLaVA's older key layout opens with random weights and a warning.
    for ours, plain in NAMES.items():
        mapping = get_checkpoint_conversion_mapping(plain)
        assert mapping is not None
        register_checkpoint_conversion_mapping(ours, mapping, overwrite=True)
