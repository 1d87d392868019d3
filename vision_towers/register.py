"""Make our towers known to the Auto classes, to `describe_tower`, and to the checkpoint key maps of transformers."""

from dataclasses import replace

from transformers import AutoConfig, AutoImageProcessor, AutoModel, CLIPImageProcessor, CLIPImageProcessorPil
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import PrefixChange

from .cloc_model import ClocConfig, ClocModel
from .cloc_vision import ClocVisionConfig, ClocVisionModel
from .describe import Describe, TowerSpec, describe_tower, register_tower, registered_towers
from .rice_config import RiceVisionConfig
from .rice_model import RiceVisionModel
from .roi_model import RoiVisionConfig, RoiVisionModel
from .umg_clip_model import UmgClipConfig, UmgClipModel
from .umg_clip_vision import UmgClipVisionConfig, UmgClipVisionModel


def describe_rice(config) -> TowerSpec:
    """RICE is its native ViT plus a readout as wide as the ViT."""
    native = registered_towers()["mlcd_vision_model"](config)
    return replace(native, region_dim=config.hidden_size, region_readout="rice")


def describe_wrapped(readout: str) -> Describe:
    """The native tower inside, without its registers, plus a readout as wide as the tower."""

    def describe(config) -> TowerSpec:
        native = describe_tower(config.tower_config)
        prefix = min(1, native.num_prefix_tokens)
        return replace(native, num_prefix_tokens=prefix, region_dim=native.hidden_size, region_readout=readout)

    return describe


def register_all() -> None:
    """Register once, at import."""
    register_tower("rice_vision_model", describe_rice)
    register_tower("roi_vision_model", describe_wrapped("roi"))
    register_tower("cloc_vision_model", describe_wrapped("cloc"))
    register_tower("umg_clip_vision_model", describe_wrapped("umg_clip"))
    for config, model in (
        (RiceVisionConfig, RiceVisionModel),
        (RoiVisionConfig, RoiVisionModel),
        (ClocVisionConfig, ClocVisionModel),
        (UmgClipVisionConfig, UmgClipVisionModel),
    ):
        AutoConfig.register(config.model_type, config)
        AutoModel.register(config, model)
        AutoImageProcessor.register(
            config, image_processor_classes={"torchvision": CLIPImageProcessor, "pil": CLIPImageProcessorPil}
        )
    for config, model in ((ClocConfig, ClocModel), (UmgClipConfig, UmgClipModel)):
        AutoConfig.register(config.model_type, config)
        AutoModel.register(config, model)
    # Older MLCD files carry `vision_model.` before every key. Alone that loads through base_model_prefix; inside a
    # LLaVA it needs a map, and transformers 5.23 registers none under the class it uses. Nor does it have one that
    # takes the vision part out of a whole AIMv2, as it has for CLIP and SigLIP.
    for name in ("MLCDVisionModel", "RiceVisionModel", "Aimv2VisionModel"):
        register_checkpoint_conversion_mapping(name, [PrefixChange(prefix_to_remove="vision_model")], overwrite=True)
