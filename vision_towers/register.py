"""Make our towers known to the Auto classes, to `describe_tower`, and to the checkpoint key maps of transformers."""

from dataclasses import replace

from transformers import AutoConfig, AutoImageProcessor, AutoModel, CLIPImageProcessor, CLIPImageProcessorPil
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import PrefixChange

from .describe import TowerSpec, describe_tower, register_tower, registered_towers
from .rice_config import RiceVisionConfig
from .rice_model import RiceVisionModel
from .roi_model import RoiVisionConfig, RoiVisionModel


def describe_rice(config) -> TowerSpec:
    """RICE is its native ViT plus a readout as wide as the ViT."""
    native = registered_towers()["mlcd_vision_model"](config)
    return replace(native, region_dim=config.hidden_size, region_readout="rice")


def describe_roi(config) -> TowerSpec:
    """The native tower inside, without its registers, plus RoIAlign."""
    native = describe_tower(config.tower_config)
    return replace(
        native,
        num_prefix_tokens=min(1, native.num_prefix_tokens),
        region_dim=native.hidden_size,
        region_readout="roi",
    )


def register_all() -> None:
    """Register once, at import."""
    register_tower("rice_vision_model", describe_rice)
    register_tower("roi_vision_model", describe_roi)
    for config, model in ((RiceVisionConfig, RiceVisionModel), (RoiVisionConfig, RoiVisionModel)):
        AutoConfig.register(config.model_type, config)
        AutoModel.register(config, model)
        AutoImageProcessor.register(
            config, image_processor_classes={"torchvision": CLIPImageProcessor, "pil": CLIPImageProcessorPil}
        )
    # Older MLCD files carry `vision_model.` before every key. Alone that loads through base_model_prefix; inside a
    # LLaVA it needs a map, and transformers 5.23 registers none under the class it uses. Nor does it have one that
    # takes the vision part out of a whole AIMv2, as it has for CLIP and SigLIP.
    for name in ("MLCDVisionModel", "RiceVisionModel", "Aimv2VisionModel"):
        register_checkpoint_conversion_mapping(name, [PrefixChange(prefix_to_remove="vision_model")], overwrite=True)
