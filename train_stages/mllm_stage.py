"""Stages 1 and 2: `align` puts a tower and a language model together and trains the projectors; `instruct` goes on."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..mllm import RegionLlavaForConditionalGeneration, RegionLlavaProcessor, build_mllm, load_mllm
from ..mllm.load import check_loaded
from ..mllm.processing import RegionPrompt
from ..vision_towers import load_tower
from ..vision_towers.errors import UserError
from ..vision_towers.packaged import model_source
from .conversations import DEFAULT_MIX, check_mix
from .engine import Part, StageResult, run_stage
from .mllm_data import ConversationDataset, collate_samples
from .record_io import data_hash
from .record_source import RecordSource
from .train_config import TrainConfig

_STRICT = ConfigDict(extra="forbid")
Count = Annotated[int, Field(gt=0)]
Rate = Annotated[float, Field(ge=0)]

PARTS = {
    "tower": ("model.vision_tower",),
    "projector": ("model.multi_modal_projector",),
    "region_projector": ("model.region_projector",),
    "language_model": ("model.language_model", "lm_head"),
}


@dataclass(frozen=True, config=_STRICT)
class AlignModel:
    """What stage 1 puts together. See `mllm.build_mllm` and `RegionLlavaProcessor` for the choices."""

    tower: str
    language_model: str
    projector: Literal["mlp", "merge2x2_mlp"] = "mlp"
    image_position: Literal["none", "sin2d"] = "none"
    row_end: bool = False
    feature_layer: int | None = None
    image_size: Count | None = None
    box_format: str = "int1000"
    region_prompt: RegionPrompt = "tokens+coords"


@dataclass(frozen=True, config=_STRICT)
class InstructModel:
    """The model that stage 2 goes on with: an `align` run, or any RegionLlava checkpoint."""

    mllm: str


@dataclass(frozen=True, config=_STRICT)
class ConversationData(RecordSource):
    """Region records turned into conversations.

    mix: kind of turn -> weight (`conversations.DEFAULT_MIX`). turns: most turns a picture. max_tokens: longest
    conversation, image tokens included. cache_dir: where decoded pixels are kept; inside the run when absent.
    """

    mix: dict[str, float] = Field(default_factory=lambda: dict(DEFAULT_MIX))
    turns: Count = 6
    max_tokens: Count = 1024
    cache_dir: str | None = None


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

    model: AlignModel
    data: ConversationData
    train: TrainConfig
    lr: LearningRates = Field(default_factory=LearningRates)


@dataclass(frozen=True, config=_STRICT)
class InstructRecipe:
    """The recipe of `instruct`."""

    model: InstructModel
    data: ConversationData
    train: TrainConfig
    lr: LearningRates = Field(default_factory=lambda: LearningRates(language_model=2e-5))


def align(recipe: AlignRecipe, run_dir: str | Path, device: str = "auto", **options: Any) -> StageResult:
    """Stage 1. The finished run opens with `load_mllm`.

    Raises:
        UserError: a recipe that cannot work, said in one sentence.
    """
    torch.manual_seed(recipe.train.seed)  # the projectors start from it
    model, processor = _put_together(recipe.model)
    parents = {"tower": recipe.model.tower, "language_model": recipe.model.language_model}
    return _train("align", model, processor, recipe, Path(run_dir), parents, device, **options)


def instruct(recipe: InstructRecipe, run_dir: str | Path, device: str = "auto", **options: Any) -> StageResult:
    """Stage 2. The finished run opens with `load_mllm`.

    Raises:
        UserError: a recipe that cannot work, said in one sentence.
    """
    model, processor = load_mllm(recipe.model.mllm, device="cpu", dtype="fp32")
    parents = {"mllm": recipe.model.mllm}
    return _train("instruct", model, processor, recipe, Path(run_dir), parents, device, **options)


def _put_together(model: AlignModel) -> tuple[RegionLlavaForConditionalGeneration, RegionLlavaProcessor]:
    tower = load_tower(model.tower, dtype=torch.float32)
    source = model_source(model.language_model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        loaded: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, output_loading_info=True)
    except (OSError, ValueError) as error:
        raise UserError(f"no language model can be opened at {source!r}: {str(error).splitlines()[0]}") from error
    language_model, info = loaded
    check_loaded(source, info)
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
    model: RegionLlavaForConditionalGeneration,
    processor: RegionLlavaProcessor,
    recipe: AlignRecipe | InstructRecipe,
    run_dir: Path,
    parents: Mapping[str, Path | str],
    device: str,
    **options: Any,
) -> StageResult:
    data = recipe.data
    check_mix(data.mix)
    records = data.read()
    cache_dir = Path(data.cache_dir) if data.cache_dir else run_dir / "pixel_cache"
    dataset = ConversationDataset(
        records, processor, data.mix, turns=data.turns, max_tokens=data.max_tokens, cache_dir=cache_dir
    )
    Console(stderr=True).print(f"{stage}: {dataset.summary}", markup=False, highlight=False, soft_wrap=True)

    def save(folder: Path) -> None:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)

    rates = recipe.lr
    return run_stage(
        model=model,
        parts=[Part(name, prefixes, getattr(rates, name)) for name, prefixes in PARTS.items()],
        dataset=dataset,
        collate=partial(collate_samples, processor=processor),
        train=recipe.train,
        run_dir=run_dir,
        recipe=recipe,
        stage=stage,
        parents=parents,
        data={"records": data_hash(records)},
        save=save,
        device=device,
        **options,
    )
