"""Stages 1 and 2: `align` puts a tower and a language model together and trains the projectors; `instruct` goes on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator, ConfigDict, Discriminator, Field, Tag
from pydantic.dataclasses import dataclass
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..mllm import RegionLlavaProcessor, build_mllm, load_mllm, load_with_regions
from ..mllm.load import RegionMLLM, check_loaded
from ..mllm.processing import RegionPrompt
from ..mllm.quantize import Quant, ready_to_train
from ..vision_towers import load_tower
from ..vision_towers.errors import CANNOT_OPEN, UserError, in_one_line
from ..vision_towers.packaged import model_source
from .chat_templates import set_chat_template
from .conversations import check_mix
from .engine import StageResult, run_stage
from .lora import LoraRecipe, add_lora
from .mixed_data import StageData, mixed_data, say
from .mixture_recipe import DECODED, ConversationData, MixtureData
from .mllm_data import ConversationDataset, collate_samples
from .mllm_work import MllmWork
from .record_io import data_hash
from .train_config import TrainConfig
from .tuning import LayerDecay, check_quant, local_device, save_tuned, tuned_parts

_STRICT = ConfigDict(extra="forbid")
Count = Annotated[int, Field(gt=0)]
Rate = Annotated[float, Field(ge=0)]


@dataclass(frozen=True, config=_STRICT)
class AlignModel:
    """What stage 1 puts together. See `mllm.build_mllm` and `RegionLlavaProcessor` for the choices.

    chat_template: for a tokenizer without one, see `chat_templates`.
    """

    tower: str
    language_model: str
    projector: Literal["mlp", "merge2x2_mlp"] = "mlp"
    image_position: Literal["none", "sin2d"] = "none"
    row_end: bool = False
    feature_layer: int | None = None
    image_size: Count | None = None
    box_format: str = "int1000"
    region_prompt: RegionPrompt = "tokens+coords"
    chat_template: str | None = None


@dataclass(frozen=True, config=_STRICT)
class AlignWhole:
    """A whole model for stage 1, such as `swap` writes: a RegionLlava or RegionLlavaNext; a Llava or LlavaNext gets
    regions on the way."""

    mllm: str


def _kind_of_model(model: Any) -> str:
    whole = isinstance(model, AlignWhole) or (isinstance(model, Mapping) and "mllm" in model)
    return "<whole>" if whole else "<parts>"


def _not_both(model: Any) -> Any:
    if isinstance(model, Mapping) and "mllm" in model and len(model) > 1:
        others = ", ".join(name for name in model if name != "mllm")
        raise ValueError(f"mllm is a whole model, so {others} must go; --set 'model={{mllm: ...}}' replaces the block")
    return model


# Two parts to put together, or a whole.
ModelOfAlign = Annotated[
    Annotated[AlignModel, Tag("<parts>")] | Annotated[AlignWhole, Tag("<whole>")],
    Discriminator(_kind_of_model),
    BeforeValidator(_not_both),
]


@dataclass(frozen=True, config=_STRICT)
class InstructModel:
    """The model that stage 2 goes on with: an `align` run, or whatever `AlignWhole` takes.

    quant: the language model's weights in int8 or nf4 (QLoRA); then only adapters of it can train.
    """

    mllm: str
    quant: Quant = "none"


def _kind_of_data(data: Any) -> str:
    mixed = isinstance(data, MixtureData) or (isinstance(data, Mapping) and "sources" in data)
    return "<sources>" if mixed else "<records>"


# One set of records, or sources that are mixed. The tags stand in no message: see `recipe`.
Data = Annotated[
    Annotated[ConversationData, Tag("<records>")] | Annotated[MixtureData, Tag("<sources>")],
    Discriminator(_kind_of_data),
]


@dataclass(frozen=True, config=_STRICT)
class LearningRates:
    """Peak learning rate of each part; 0 freezes it."""

    tower: Rate = 0.0
    projector: Rate = 1e-3
    region_projector: Rate = 1e-3
    language_model: Rate = 0.0


@dataclass(frozen=True, config=_STRICT)
class AlignRecipe:
    """The recipe of `align`. Its mix needs kinds with a `<region>` in them, or the region projector learns nothing."""

    model: ModelOfAlign
    data: Data
    train: TrainConfig
    lr: LearningRates = Field(default_factory=LearningRates)
    layer_decay: LayerDecay = Field(default_factory=LayerDecay)


@dataclass(frozen=True, config=_STRICT)
class InstructRecipe:
    """The recipe of `instruct`."""

    model: InstructModel
    data: Data
    train: TrainConfig
    lr: LearningRates = Field(default_factory=lambda: LearningRates(language_model=2e-5))
    layer_decay: LayerDecay = Field(default_factory=LayerDecay)
    lora: LoraRecipe | None = None


def align(recipe: AlignRecipe, run_dir: str | Path, device: str = "auto", **options: Any) -> StageResult:
    """Stage 1. The finished run opens with `load_mllm`.

    Raises:
        UserError: a recipe that cannot work, said in one sentence.
    """
    torch.manual_seed(recipe.train.seed)  # the projectors start from it
    parents: dict[str, Path | str]
    if isinstance(recipe.model, AlignWhole):
        model, processor = load_with_regions(recipe.model.mllm, device="cpu", dtype="fp32")
        parents = {"mllm": recipe.model.mllm}
    else:
        model, processor = _opened(recipe.model)
        parents = {"tower": recipe.model.tower, "language_model": recipe.model.language_model}
    return _train("align", model, processor, recipe, Path(run_dir), parents, device, **options)


def instruct(recipe: InstructRecipe, run_dir: str | Path, device: str = "auto", **options: Any) -> StageResult:
    """Stage 2. The finished run opens with `load_mllm`.

    Raises:
        UserError: a recipe that cannot work, said in one sentence.
    """
    lora = recipe.lora
    check_quant(recipe.model.quant, asdict(recipe.lr), lora)
    # Quantized weights are made where they stay; all others move when training begins.
    place = "cpu" if recipe.model.quant == "none" else local_device(device)
    if lora is None and recipe.model.quant == "none":
        model, processor = load_with_regions(recipe.model.mllm, device=place, dtype="fp32", merge=True)
    else:  # whose base is opened again later, as it is
        model, processor = load_mllm(
            recipe.model.mllm, device=place, dtype="fp32", quant=recipe.model.quant, merge=True
        )
    ready_to_train(model, torch.bfloat16 if recipe.train.precision == "bf16" else torch.float32)
    if lora is not None:
        torch.manual_seed(recipe.train.seed)
        add_lora(model, lora)
    parents = {"mllm": recipe.model.mllm}
    return _train("instruct", model, processor, recipe, Path(run_dir), parents, device, **options)


def _opened(model: AlignModel) -> tuple[RegionMLLM, RegionLlavaProcessor]:
    tower = load_tower(model.tower, dtype=torch.float32)
    source = model_source(model.language_model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        loaded: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, output_loading_info=True)
    except CANNOT_OPEN as error:
        raise UserError(f"no language model can be opened at {source!r}: {in_one_line(error)}") from error
    language_model, info = loaded
    check_loaded(source, info)
    return put_together(model, tower, language_model, tokenizer)


def put_together(
    model: AlignModel, tower: PreTrainedModel, language_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> tuple[RegionMLLM, RegionLlavaProcessor]:
    """The model of stage 1 made of its parts, with the recipe's choices.

    Raises:
        UserError: parts that do not go together, or a tokenizer without a chat template.
    """
    set_chat_template(tokenizer, model.chat_template, model_source(model.language_model))
    return build_mllm(
        tower,
        language_model,
        tokenizer,
        projector=model.projector,
        image_position=model.image_position,
        row_end=model.row_end,
        feature_layer=model.feature_layer,
        image_size=model.image_size,
        box_format=model.box_format,
        region_prompt=model.region_prompt,
    )


def _train(
    stage: str,
    model: RegionMLLM,
    processor: RegionLlavaProcessor,
    recipe: AlignRecipe | InstructRecipe,
    run_dir: Path,
    parents: Mapping[str, Path | str],
    device: str,
    **options: Any,
) -> StageResult:
    data = _stage_data(model, processor, recipe, run_dir, device)
    say(f"{stage}: {data.about}")

    lora = recipe.lora if isinstance(recipe, InstructRecipe) else None
    base = recipe.model.mllm if isinstance(recipe, InstructRecipe) and lora is not None else None
    parts = tuned_parts(model, asdict(recipe.lr), recipe.layer_decay, lora)

    def save(folder: Path) -> None:
        save_tuned(model, processor, folder, base)

    with data.around():
        result = run_stage(
            model=model,
            parts=parts,
            dataset=data.dataset,
            collate=data.collate,
            train=recipe.train,
            run_dir=run_dir,
            recipe=recipe,
            stage=stage,
            parents=parents,
            data=data.hashes,
            save=save,
            on_batch=data.on_batch,
            count_work=MllmWork(model, parts, processor.tokenizer.pad_token_id),
            trained_only=lora is not None,
            device=device,
            **options,
        )
    if lost := data.afterwards():
        say(f"{stage}: {lost}")
    return result


def _stage_data(
    model: RegionMLLM,
    processor: RegionLlavaProcessor,
    recipe: AlignRecipe | InstructRecipe,
    run_dir: Path,
    device: str,
) -> StageData:
    data = recipe.data
    if isinstance(data, MixtureData) or data.batches != DECODED:
        lora = recipe.lora if isinstance(recipe, InstructRecipe) else None
        trains = bool(recipe.lr.tower) or (lora is not None and "tower" in lora.on)
        mixture = data if isinstance(data, MixtureData) else data.mixture()
        return mixed_data(mixture, model, processor, recipe.train, tower_trains=trains, run_dir=run_dir, device=device)
    check_mix(data.mix)
    records = data.read()
    cache_dir = Path(data.cache_dir) if data.cache_dir else run_dir / "pixel_cache"
    dataset = ConversationDataset(
        records, processor, data.mix, turns=data.turns, max_tokens=data.max_tokens, cache_dir=cache_dir
    )
    collate = partial(collate_samples, processor=processor)
    return StageData(dataset, collate, {"records": data_hash(records)}, dataset.summary)
