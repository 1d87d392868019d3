"""Regions for an existing LLaVA or LLaVA-NeXT: `<region>` in its text takes an embedding of a box."""

import copy
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..vision_towers import UserError, describe_tower, tower_image_processor
from ..vision_towers.lift import lift_tower, same_tokens
from ..vision_towers.packaged import model_source
from ..vision_towers.remote_code import model_type
from .adapters import adapter_base
from .build import generation_config
from .config import RegionLlavaConfig, RegionLlavaNextConfig
from .fresh import fresh_part, with_more_rows
from .load import MODELS, RegionMLLM, load_mllm
from .next_processing import RegionLlavaNextProcessor
from .plain_llava import load_llava
from .processing import RegionLlavaProcessor
from .prompts import IMAGE_TOKEN, REGION_TOKEN, assistant_message, user_message
from .swap import TOWER, adopt

CONFIGS = {"llava": RegionLlavaConfig, "llava_next": RegionLlavaNextConfig}

# Templates of multimodal models take content as a list of parts and drop plain text without a word; our questions are
# plain text.
TEXT_AS_PART = """{%- set turns = namespace(all=[]) -%}
{%- for message in messages -%}
{%- if message.content is string -%}
{%- set part = {'type': 'text', 'text': message.content} -%}
{%- set turns.all = turns.all + [{'role': message.role, 'content': [part]}] -%}
{%- else -%}{%- set turns.all = turns.all + [message] -%}{%- endif -%}
{%- endfor -%}
{%- set messages = turns.all -%}
"""


# The template of llava-1.5-hf writes no end after an answer: a model trained by it would not learn to stop. LLaVA-1.5
# itself was trained with one (its `sep2`).
ANSWERS_CLOSED = """{%%- set turns = namespace(all=[]) -%%}
{%%- for message in messages -%%}
{%%- if message.role == 'assistant' and message.content is string -%%}
{%%- set turns.all = turns.all + [{'role': message.role, 'content': message.content + %s}] -%%}
{%%- else -%%}{%%- set turns.all = turns.all + [message] -%%}{%%- endif -%%}
{%%- endfor -%%}
{%%- set messages = turns.all -%%}
"""


def add_regions(model: PreTrainedModel, processor) -> tuple[RegionMLLM, RegionLlavaProcessor]:
    """Turn a Llava into a RegionLlava, a LlavaNext into a RegionLlavaNext: the tower gets a readout as `load_tower` has
    it, the tokenizer `<region>`, the model a new region projector (untrained).

    Without regions its logits are the given model's, unless that cuts patches off or takes registers for patches, which
    is mended. The language model, the image projector and the tower are taken over, not copied; the embeddings grow
    when they have no row left for `<region>`.

    Args:
        model: a Llava or LlavaNext, on the meta device or not (but for its tower). processor: the model's; it is not
            changed.
    Raises:
        UserError: another kind of model, or a tokenizer that does not fit it.
    """
    if model.config.model_type not in CONFIGS:
        raise UserError(
            f"a {model.config.model_type} takes no region embeddings: name boxes in its text (region_prompt: coords) "
            "or draw them into the picture (region_prompt: overlay)."
        )
    whole: Any = model
    old: Any = model.config
    tokenizer = _tokenizer(processor, old)
    region = tokenizer.convert_tokens_to_ids(REGION_TOKEN)
    given_tower = whole.model.vision_tower
    tower = lift_tower(given_tower)
    spec = describe_tower(tower.config)
    language_model = whole.model.language_model
    _grow(language_model, whole.lm_head, region + 1)

    not_ours = (
        "vision_feature_select_strategy",
        "model_type",
        "architectures",
        "transformers_version",
        "vision_config",
        "text_config",
    )
    fields: dict[str, Any] = {name: value for name, value in old.to_dict().items() if name not in not_ours}
    # A tower that shows registers to a plain LLaVA is lifted to one that shows a single class token; and one without a
    # class token must not lose its first patch.
    strategy = old.vision_feature_select_strategy if same_tokens(given_tower) else spec.select_strategy
    if spec.num_prefix_tokens == 0:
        strategy = "full"
    fields |= {"vision_config": tower.config, "text_config": language_model.config, "region_token_index": region}
    config = CONFIGS[old.model_type](**fields, vision_feature_select_strategy=strategy)
    weight = next(language_model.parameters())
    device = torch.device("cpu") if weight.is_meta else weight.device
    with torch.device("meta"):
        new = MODELS[type(config)](config)
    adopt(new.model, whole.model, leave=(TOWER,))
    new.lm_head = whole.lm_head
    new.model.vision_tower = tower
    fresh_part(new.model.region_projector, weight.dtype, device, getattr(config.text, "initializer_range", 0.02))
    new.generation_config = generation_config(model, (config.image_token_id, config.region_token_id))
    return new.train(model.training), _processor(processor, tokenizer, config)


def load_with_regions(
    name_or_path: str | Path, *, device: str = "auto", dtype: str = "auto", merge: bool = False
) -> tuple[RegionMLLM, RegionLlavaProcessor]:
    """What `load_mllm` opens; a plain Llava or LlavaNext gets regions on the way.

    Args, errors: as of `load_mllm`.
    """
    if adapter_base(model_source(name_or_path)) is None and model_type(name_or_path) in CONFIGS:
        return add_regions(*load_llava(name_or_path, device=device, dtype=dtype))
    return load_mllm(name_or_path, device=device, dtype=dtype, merge=merge)


def _tokenizer(processor: Any, config: Any) -> Any:
    """A copy of the tokenizer that knows `<region>`."""
    tokenizer = copy.deepcopy(processor.tokenizer)
    if tokenizer.convert_tokens_to_ids(IMAGE_TOKEN) != config.image_token_id:
        raise UserError(
            f"the tokenizer's {IMAGE_TOKEN} is not the model's image token {config.image_token_id}; "
            f"regions need a model whose image token is {IMAGE_TOKEN}."
        )
    tokenizer.add_special_tokens({"extra_special_tokens": [REGION_TOKEN]}, replace_extra_special_tokens=False)
    if tokenizer.pad_token is None:  # batches of conversations are padded
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _grow(language_model: Any, lm_head: Any, rows: int) -> None:
    """Rows for new tokens, in place; many checkpoints have some to spare."""
    embeddings = language_model.get_input_embeddings()
    if embeddings.num_embeddings >= rows:
        return
    tied = lm_head.weight is embeddings.weight
    embeddings.weight = nn.Parameter(with_more_rows(embeddings.weight.detach(), rows))
    head = embeddings.weight if tied else nn.Parameter(with_more_rows(lm_head.weight.detach(), rows))
    lm_head.weight = head
    embeddings.num_embeddings = lm_head.out_features = language_model.config.vocab_size = rows


def _processor(old: Any, tokenizer: Any, config: RegionLlavaConfig | RegionLlavaNextConfig) -> RegionLlavaProcessor:
    spec = describe_tower(config.vision)
    square = {"patch_size": spec.patch_size, "image_size": spec.image_size, "chat_template": _template(old, tokenizer)}
    if isinstance(config, RegionLlavaNextConfig):
        return RegionLlavaNextProcessor(copy.deepcopy(old.image_processor), tokenizer, **square)
    image_processor = tower_image_processor(config.vision)
    image_processor.image_mean, image_processor.image_std = (
        old.image_processor.image_mean,
        old.image_processor.image_std,
    )
    prefix = spec.num_prefix_tokens - (config.vision_feature_select_strategy == "default")
    return RegionLlavaProcessor(image_processor, tokenizer, num_prefix_tokens=prefix, **square)


def _template(processor: Any, tokenizer: Any) -> str:
    """The model's chat template, made to take plain text, and to close answers."""
    template = processor.chat_template or processor.tokenizer.chat_template
    if template is None:
        raise UserError("the model has no chat template; set processor.chat_template to the one it was trained with.")
    probe = processor.apply_chat_template([user_message("probe", with_image=True)], chat_template=template)
    if f"{IMAGE_TOKEN}probe" not in probe:
        template = TEXT_AS_PART + template
    end = tokenizer.eos_token
    answered = [user_message("probe", with_image=True), assistant_message("answer")]
    written = processor.apply_chat_template(answered, chat_template=template)
    closed = end is None or any(mark in written.rpartition("answer")[2] for mark in tokenizer.all_special_tokens)
    return template if closed else ANSWERS_CLOSED % json.dumps(end) + template
