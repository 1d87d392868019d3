"""Tiny random towers, lively enough that attention differs from plain averaging."""

from collections.abc import Callable

import pytest
import torch
from transformers import (
    Aimv2VisionConfig,
    Aimv2VisionModel,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    MLCDVisionConfig,
    MLCDVisionModel,
    PreTrainedModel,
    SiglipConfig,
    SiglipModel,
    SiglipTextConfig,
    SiglipVisionConfig,
    SiglipVisionModel,
)

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "image_size": 56,
    "patch_size": 14,
}
NATIVE = {
    "clip": (CLIPVisionModel, CLIPVisionConfig, {}),
    "siglip": (SiglipVisionModel, SiglipVisionConfig, {}),
    "siglip_headless": (SiglipVisionModel, SiglipVisionConfig, {"vision_use_head": False}),
    "mlcd": (MLCDVisionModel, MLCDVisionConfig, {}),
    "dinov2": (Dinov2Model, Dinov2Config, {"mlp_ratio": 2}),
    "dinov3": (DINOv3ViTModel, DINOv3ViTConfig, {"num_register_tokens": 4}),
    "aimv2": (Aimv2VisionModel, Aimv2VisionConfig, {}),
    "aimv2_native": (Aimv2VisionModel, Aimv2VisionConfig, {"is_native": True}),
}
TEXT = {
    "vocab_size": 20,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 8,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 3,
}
BuildNative = Callable[..., PreTrainedModel]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def native() -> BuildNative:
    """`native(name, **fields)`: a native tower of `NATIVE` with random weights."""

    def build(name: str, attention: str = "sdpa", **fields) -> PreTrainedModel:
        model_class, config_class, own = NATIVE[name]
        config = config_class(**(SIZES | own | fields))
        return enliven(model_class._from_config(config, attn_implementation=attention)).eval()

    return build


@pytest.fixture
def native_pair(native) -> BuildNative:
    """`native_pair("clip")` or `("siglip")`: a native image-text pair with random weights, end token 3."""

    def build(name: str) -> PreTrainedModel:
        vision = native(name).config
        if name == "clip":
            model = CLIPModel(CLIPConfig(vision_config=vision, text_config=CLIPTextConfig(**TEXT), projection_dim=24))
        else:
            model = SiglipModel(SiglipConfig(vision_config=vision, text_config=SiglipTextConfig(**TEXT)))
        return enliven(model).eval()

    return build


def enliven(model: PreTrainedModel) -> PreTrainedModel:
    """Weights of a size at which a wrong mask or a wrong angle shows."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator) * (0.1 if weight.ndim == 1 else 0.25)
            weight.copy_(noise + (1.0 if "norm" in name and name.endswith("weight") else 0.0))
    return model
