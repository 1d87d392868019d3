"""Make `region_llava` known to the Auto classes and to the checkpoint key maps of transformers."""

from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping

from .config import RegionLlavaConfig
from .modeling import RegionLlavaForConditionalGeneration
from .processing import RegionLlavaProcessor


def register_all() -> None:
    """Register once, at import."""
    AutoConfig.register(RegionLlavaConfig.model_type, RegionLlavaConfig)
    AutoModelForImageTextToText.register(RegionLlavaConfig, RegionLlavaForConditionalGeneration)
    AutoProcessor.register(RegionLlavaConfig, RegionLlavaProcessor)
    # Without these a checkpoint in LLaVA's older key layout opens with random weights and a warning.
    for ours, plain in (("region_llava", "llava"), ("RegionLlavaModel", "LlavaModel")):
        mapping = get_checkpoint_conversion_mapping(plain)
        assert mapping is not None
        register_checkpoint_conversion_mapping(ours, mapping, overwrite=True)
