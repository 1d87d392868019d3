"""Put a tower and a language model together into a RegionLlava with fresh projectors."""

from collections.abc import Iterable
from typing import Any, Literal

import torch
from transformers import GenerationConfig, PreTrainedModel

from ..vision_towers import describe_tower, tower_image_processor
from .config import RegionLlavaConfig
from .fresh import fresh_part
from .modeling import RegionLlavaForConditionalGeneration
from .processing import RegionLlavaProcessor, RegionPrompt
from .prompts import IMAGE_TOKEN, REGION_TOKEN

SAMPLING = ("temperature", "top_k", "top_p", "top_h", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")


def build_mllm(
    tower: PreTrainedModel,
    language_model: PreTrainedModel,
    tokenizer,
    *,
    projector: Literal["mlp", "merge2x2_mlp"] = "mlp",
    image_position: Literal["none", "sin2d"] = "none",
    row_end: bool = False,
    feature_layer: int | None = None,
    image_size: int | None = None,
    box_format: str = "int1000",
    region_prompt: RegionPrompt = "tokens+coords",
) -> tuple[RegionLlavaForConditionalGeneration, RegionLlavaProcessor]:
    """A RegionLlava around the given modules (they are taken over, not copied); both projectors are new.

    Args:
        tower: from `load_tower`, with a region readout.
        language_model: a causal LM; its embeddings grow when the tokenizer lacks `<image>` or `<region>`.
        tokenizer: its tokenizer, with a chat template.
        feature_layer: `hidden_states` entry the language model sees; the tower's default when absent.
        image_size: side of the input in pixels; the tower's own when absent.
    """
    tokenizer.add_special_tokens(
        {"extra_special_tokens": [t for t in (IMAGE_TOKEN, REGION_TOKEN) if t not in tokenizer.get_vocab()]},
    )
    embeddings: Any = language_model.get_input_embeddings()
    if len(tokenizer) > embeddings.num_embeddings:
        language_model.resize_token_embeddings(len(tokenizer))
    spec = describe_tower(tower.config)
    config = RegionLlavaConfig(
        vision_config=tower.config,
        text_config=language_model.config,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        region_token_index=tokenizer.convert_tokens_to_ids(REGION_TOKEN),
        vision_feature_layer=spec.default_feature_layer if feature_layer is None else feature_layer,
        vision_feature_select_strategy=spec.select_strategy,
        projector=projector,
        image_position=image_position,
        row_end=row_end,
        tie_word_embeddings=language_model.config.tie_word_embeddings,
    )
    side = image_size or spec.image_size
    processor = RegionLlavaProcessor(
        tower_image_processor(tower.config),
        tokenizer,
        patch_size=spec.patch_size,
        image_size=side,
        merge_size=config.merge_size,
        row_end=row_end,
        box_format=box_format,
        region_prompt=region_prompt,
        chat_template=tokenizer.chat_template,
    )
    config.image_seq_length = processor.image_tokens(processor.frame((side, side)))

    with torch.device("meta"):  # the modules we were given are the only copy in memory
        model = RegionLlavaForConditionalGeneration(config)
    inner = model.model
    inner.vision_tower, inner.language_model = tower, language_model.get_decoder()
    model.lm_head = language_model.get_output_embeddings()  # pyright: ignore[reportAttributeAccessIssue]
    for part in (inner.multi_modal_projector, inner.region_projector):
        fresh_part(
            part, language_model.dtype, language_model.device, config.text.initializer_range, torch.default_generator
        )
    # The model's tying points at modules that have just been replaced.
    model.tie_weights()
    model.generation_config = generation_config(language_model, (model.config.image_token_id, config.region_token_id))
    return model, processor


def generation_config(language_model: PreTrainedModel, placeholder_ids: Iterable[int]) -> GenerationConfig:
    """The language model's own, greedy, and never emitting a placeholder: an emitted one would want an embedding.

    How the language model was sampled from is left behind: transformers saves no greedy configuration that holds it.
    """
    own = language_model.generation_config.to_dict()
    config = GenerationConfig.from_dict({name: value for name, value in own.items() if name not in SAMPLING})
    config.do_sample = False
    config.suppress_tokens = sorted(set(config.suppress_tokens or []) | set(placeholder_ids))
    return config
