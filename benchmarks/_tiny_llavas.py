"""Random LLaVAs and towers of a few thousand parameters, with the tensor names of real checkpoints."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    Aimv2VisionConfig,
    Aimv2VisionModel,
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    LlavaProcessor,
    MLCDVisionConfig,
    MLCDVisionModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SiglipVisionConfig,
    SiglipVisionModel,
    VipLlavaConfig,
    VipLlavaForConditionalGeneration,
)

from regiontower.vision_towers import RiceVisionConfig, RiceVisionModel

WIDTH, OTHER_WIDTH = 32, 48
SIDE, PATCH = 56, 14
TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image> ' }}{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] + ' ' }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
WORDS = ["USER:", "ASSISTANT:", "What", "is", "in", "the", "picture", "?", "star", "red", "a", "blue", "of", "on"]
TOWERS = {
    "CLIP": (CLIPVisionModel, CLIPVisionConfig, {}),
    "SigLIP": (SiglipVisionModel, SiglipVisionConfig, {}),
    "SigLIP2, fixed size": (SiglipVisionModel, SiglipVisionConfig, {"vision_use_head": False}),
    "MLCD": (MLCDVisionModel, MLCDVisionConfig, {}),
    "DINOv2": (Dinov2Model, Dinov2Config, {"mlp_ratio": 2}),
    "DINOv3": (DINOv3ViTModel, DINOv3ViTConfig, {"num_register_tokens": 4}),
    "AIMv2": (Aimv2VisionModel, Aimv2VisionConfig, {}),
    "RICE": (RiceVisionModel, RiceVisionConfig, {}),
}
KINDS = {
    "Llava": (LlavaForConditionalGeneration, LlavaConfig, LlamaConfig),
    "LlavaNext": (LlavaNextForConditionalGeneration, LlavaNextConfig, LlamaConfig),
    "LlavaOnevision": (LlavaOnevisionForConditionalGeneration, LlavaOnevisionConfig, Qwen2Config),
    "VipLlava": (VipLlavaForConditionalGeneration, VipLlavaConfig, LlamaConfig),
}


def tiny_tower(name: str, width: int = OTHER_WIDTH, seed: int = 1, **fields: Any) -> PreTrainedModel:
    """A random tower of `TOWERS`."""
    kind, config, own = TOWERS[name]
    sizes = {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": SIDE,
        "patch_size": PATCH,
    }
    return _lively(kind(config(**sizes | own | fields)), seed)


def tiny_llava(kind: str, dtype: torch.dtype = torch.float32, tie: bool = False, seed: int = 0) -> tuple[Any, Any]:
    """(model, processor) of a random LLaVA of `KINDS` on the tower its kind usually has."""
    model_kind, config_kind, text_kind = KINDS[kind]
    tokenizer = _tokenizer()
    siglip = kind == "LlavaOnevision"
    tower = tiny_tower("SigLIP" if siglip else "CLIP", WIDTH, seed)
    text = text_kind(
        vocab_size=len(tokenizer) + 2,
        hidden_size=40,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=tie,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    points = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
    fields: dict[str, Any] = {"image_token_index": tokenizer.convert_tokens_to_ids("<image>")}
    if kind in ("LlavaNext", "LlavaOnevision"):
        fields["image_grid_pinpoints"] = points
    if kind == "LlavaOnevision":
        fields["video_token_index"] = tokenizer.convert_tokens_to_ids("<video>")
    if kind == "VipLlava":
        fields["vision_feature_layer"] = [-1, -2]
    model = model_kind(config_kind(vision_config=tower.config, text_config=text, tie_word_embeddings=tie, **fields))
    model = _lively(model, seed)
    for weight in model.parameters():  # not model.to(dtype), which rounds rotary frequencies too
        weight.data = weight.data.to(dtype)
    model.config.dtype = dtype
    return model, _processor(kind, tokenizer, points)


def save_as(model: Any, processor: Any, folder: Path, layout: str, shards: int = 1) -> Path:
    """Write a checkpoint.

    Args:
        layout: "v4" (names of the hub's LLaVAs: `language_model.model.*`, `vision_tower.vision_model.*`) or "v5" (those
            in memory: `model.language_model.*`).
        shards: number of files; the tower and the projector stand in the first, as on the hub.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder, save_original_format=False)  # for the configurations
    (folder / "model.safetensors").unlink()
    tied = model.config.tie_word_embeddings
    state = {n: t.contiguous() for n, t in model.state_dict().items() if not (tied and n == "lm_head.weight")}
    if layout == "v4":
        state = {_v4_name(name, model): tensor for name, tensor in state.items()}
    language = [name for name in state if "vision_tower" not in name and "projector" not in name]
    step = -(-len(language) // shards)
    parts = [language[i : i + step] for i in range(0, len(language), step)]
    parts[0] += sorted(set(state) - set(language))
    if len(parts) == 1:
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        _save_shards(folder, state, parts)
    processor.save_pretrained(folder)
    return folder


def _save_shards(folder: Path, state: dict[str, torch.Tensor], parts: list[list[str]]) -> None:
    weight_map = {}
    for number, part in enumerate(parts, start=1):
        file = f"model-{number:05}-of-{len(parts):05}.safetensors"
        save_file({name: state[name] for name in part}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": sum(t.nbytes for t in state.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _v4_name(name: str, model: Any) -> str:
    nested = model.config.vision_config.model_type in ("clip_vision_model", "siglip_vision_model")
    tower = "vision_tower.vision_model." if nested else "vision_tower."
    name = name.replace("lm_head.", "language_model.lm_head.")
    name = name.replace("model.language_model.", "language_model.model.").replace("model.vision_tower.", tower)
    return name.removeprefix("model.")


def _lively(model: Any, seed: int) -> Any:
    """Weights of a size at which a wrong tensor shows in the answer."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator) * (0.1 if weight.ndim == 1 else 0.25)
            weight.copy_(noise + (1.0 if "norm" in name and name.endswith("weight") else 0.0))
    return model.eval()


def _tokenizer() -> PreTrainedTokenizerFast:
    vocab = {word: index for index, word in enumerate(["<pad>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>")
    fast.add_special_tokens({"extra_special_tokens": ["<image>", "<video>"]})
    return fast


def _processor(kind: str, tokenizer: Any, points: list[list[int]]) -> Any:
    short, square = {"shortest_edge": SIDE}, {"height": SIDE, "width": SIDE}
    if kind == "LlavaOnevision":
        return LlavaOnevisionProcessor(
            LlavaOnevisionImageProcessor(size=square, image_grid_pinpoints=points),
            tokenizer,
            LlavaOnevisionVideoProcessor(size=square),
            num_image_tokens=(SIDE // PATCH) ** 2,
            vision_feature_select_strategy="full",
            chat_template=TEMPLATE,
        )
    about = {"patch_size": PATCH, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    if kind == "LlavaNext":
        images = LlavaNextImageProcessor(size=short, crop_size=square, image_grid_pinpoints=points)
        return LlavaNextProcessor(images, tokenizer, chat_template=TEMPLATE, **about)
    return LlavaProcessor(CLIPImageProcessor(size=short, crop_size=square), tokenizer, chat_template=TEMPLATE, **about)
