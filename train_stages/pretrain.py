"""Stage 0: a vision tower trained on labelled regions (RICE), or on captions (CLIP, the control)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from rich.console import Console
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..mllm.boxes import mean_colour
from ..vision_towers import RiceVisionConfig, RiceVisionModel, describe_tower, load_tower, tower_image_processor
from ..vision_towers.errors import UserError
from .augment import AugmentConfig
from .clip_objective import ClipConfig, ClipObjective
from .engine import Part, StageResult, finished_result, join_processes, run_stage
from .engine.manifest import read_stage, write_stage
from .pixels import PixelCache
from .pretrain_data import CaptionDataset, CaptionSource, RegionDataset, collate_regions
from .pretrain_eval import object_top1
from .pretrain_heads import CENTRES_FILE, load_centres, load_text_side, save_centres, save_text_side, whole_centres
from .record_io import RecordSet, data_hash
from .record_source import RecordSource
from .region_labels import ObjectClasses, ObjectLabels, TextClasses, open_tokenizer
from .rice_objective import RiceConfig, RiceObjective
from .train_config import TrainConfig

CACHE_FOLDER = "pixel_cache"

_STRICT = ConfigDict(extra="forbid")
Count = Annotated[int, Field(gt=0)]


@dataclass(frozen=True, config=_STRICT)
class TowerSize:
    """A new RICE tower; the defaults are `nano`. `hidden_size / heads` must be a multiple of 4 (axial rotary code).

    num_region_layers and region_mask_rule: see `RiceVisionConfig`.
    """

    hidden_size: Count = 192
    layers: Count = 6
    heads: Count = 6
    intermediate_size: Count = 768
    patch_size: Count = 14
    image_size: Count = 112
    num_region_layers: Count = 2
    region_mask_rule: Literal["centre", "overlap"] = "centre"

    def __post_init__(self) -> None:
        if self.hidden_size % (4 * self.heads):
            raise ValueError(f"hidden_size {self.hidden_size} must be a multiple of 4 x heads = {4 * self.heads}")


@dataclass(frozen=True, config=_STRICT)
class PretrainModel:
    """What is trained. objective: "rice" or "clip" (read with the block of that name). tower: a checkpoint to start
    from, opened by `load_tower`; without it a new tower of `size`. keep_heads: go on with the class centres, or the
    text tower and projections, of the finished run that `tower` names, instead of new ones."""

    objective: Literal["rice", "clip"] = "rice"
    tower: str | None = None
    keep_heads: bool = False
    size: TowerSize = Field(default_factory=TowerSize)
    rice: RiceConfig = Field(default_factory=RiceConfig)
    clip: ClipConfig = Field(default_factory=ClipConfig)


@dataclass(frozen=True, config=_STRICT)
class PretrainData(RecordSource):
    """What is trained on.

    records, root, format: see `RecordSource`. tokenizer: folder of a transformers tokenizer; without it
    OCR regions are left out (the clip objective cannot do without). side: pixels of the letterboxed square, the tower's
    own when absent. view: pixels of the random views that the tower gets; `side` when absent. regions_per_image: N.
    object_labels: "category", "tags" (tags and category) or "cluster". captions (clip): see `CaptionDataset`. stuff:
    whether stuff regions take part. cache_dir: where decoded pixels are kept; inside the run when absent. augment: see
    `AugmentConfig`.
    """

    tokenizer: str | None = None
    side: Count | None = None
    view: Count | None = None
    regions_per_image: Count = 10
    object_labels: ObjectLabels = "category"
    captions: CaptionSource = "image"
    stuff: bool = True
    cache_dir: str | None = None
    augment: AugmentConfig = Field(default_factory=AugmentConfig)


@dataclass(frozen=True, config=_STRICT)
class PretrainEval:
    """Held-out records whose regions are classified by the nearest class centre at the end (rice objective only)."""

    records: str | tuple[str, ...] | None = None
    root: str | None = None
    format: str = "records"
    batch_size: Count = 64


@dataclass(frozen=True, config=_STRICT)
class PretrainLr:
    """Peak learning rates. heads: class centres, or the text tower and projections of the clip objective."""

    tower: Annotated[float, Field(ge=0)] = 1e-3
    heads: Annotated[float, Field(ge=0)] = 1e-3


@dataclass(frozen=True, config=_STRICT)
class PretrainRecipe:
    """The recipe of `pretrain`."""

    data: PretrainData
    train: TrainConfig
    model: PretrainModel = Field(default_factory=PretrainModel)
    eval: PretrainEval = Field(default_factory=PretrainEval)
    lr: PretrainLr = Field(default_factory=PretrainLr)


@dataclass(frozen=True, config=ConfigDict(arbitrary_types_allowed=True))
class _Task:
    """A stage ready to run: what the engine takes, and a line for the user about the data."""

    objective: nn.Module
    dataset: Any
    collate: Callable[[list], dict[str, torch.Tensor]]
    save: Callable[[Path], None]
    about: str
    classes: ObjectClasses | None = None
    before_save: Callable[[], None] = lambda: None


def pretrain(recipe: PretrainRecipe, run_dir: str | Path, device: str = "auto", **options: Any) -> StageResult:
    """Train the tower of `recipe` in `run_dir` (resumed when it holds an unfinished run of the same recipe).

    The finished directory opens with `load_tower`. Beside the tower lie, for rice, `centres.safetensors` (`object`
    (K, D), `ocr` (V, D)) and `labels.json` (the classes' names), for clip `text_tower/` and `clip_heads.safetensors`.
    With `eval.records`, the result's metrics hold `held_out_object_top1` and `held_out_regions`.

    `options` go to `engine.run_stage`. Raises UserError for a recipe or data that cannot work.
    """
    run_dir = Path(run_dir)
    say = Console(stderr=True).print
    join_processes(device)  # the objective asks which classes are this process's
    torch.manual_seed(recipe.train.seed)
    tower = _tower(recipe.model)
    side = _side(recipe, tower)
    tokenizer = open_tokenizer(recipe.data.tokenizer) if recipe.data.tokenizer else None
    records = recipe.data.read()
    cache_dir = Path(recipe.data.cache_dir) if recipe.data.cache_dir else run_dir / CACHE_FOLDER
    fill = mean_colour(describe_tower(tower.config).image_mean)
    cache = PixelCache.build(records, side, cache_dir, fill=fill)
    make = _rice_task if recipe.model.objective == "rice" else _clip_task
    task = make(recipe, tower, cache, tokenizer)
    say(f"pretrain: {_bad_records(records, cache)}{task.about}", markup=False, highlight=False, soft_wrap=True)

    heads = tuple({name.split(".")[0] for name, _ in task.objective.named_parameters()} - {"tower"})
    parts = [Part("tower", ("tower",), recipe.lr.tower), Part("heads", tuple(sorted(heads)), recipe.lr.heads)]
    hashes = {"records": data_hash(records)}
    if tokenizer is not None:
        hashes["tokenizer"] = _vocabulary_hash(tokenizer)
    result = run_stage(
        model=task.objective,
        parts=parts,
        dataset=task.dataset,
        collate=task.collate,
        train=recipe.train,
        run_dir=run_dir,
        recipe=recipe,
        stage="pretrain",
        parents={"tower": recipe.model.tower} if recipe.model.tower else {},
        data=hashes,
        save=task.save,
        before_save=task.before_save,
        device=device,
        **options,
    )
    if recipe.eval.records is None or task.classes is None or "held_out_object_top1" in result.metrics:
        return result
    held_out = RecordSource(recipe.eval.records, recipe.eval.root, recipe.eval.format).read()
    held_out_cache = PixelCache.build(held_out, side, cache_dir, fill=fill)
    # Read back from disk: a run that had finished before has trained nothing in this process.
    trained = load_tower(run_dir)
    nn.Module.to(trained, next(task.objective.parameters()).device)
    centres = load_file(run_dir / CENTRES_FILE)["object"]
    found = object_top1(trained, centres, held_out_cache, task.classes, recipe.eval.batch_size)
    return _add_metrics(result, {f"held_out_{name}": value for name, value in found.items()})


def _tower(model: PretrainModel) -> PreTrainedModel:
    if model.tower is not None:
        return load_tower(model.tower, dtype=torch.float32)
    size = model.size
    return RiceVisionModel(
        RiceVisionConfig(
            hidden_size=size.hidden_size,
            num_hidden_layers=size.layers,
            num_attention_heads=size.heads,
            intermediate_size=size.intermediate_size,
            patch_size=size.patch_size,
            image_size=size.image_size,
            num_region_layers=size.num_region_layers,
            region_mask_rule=size.region_mask_rule,
        )
    )


def _side(recipe: PretrainRecipe, tower: PreTrainedModel) -> int:
    spec = describe_tower(tower.config)
    side = recipe.data.side or spec.image_size
    if side % spec.patch_size:
        raise UserError(f"data.side is {side}, it must be a multiple of the tower's patch size {spec.patch_size}.")
    if side != spec.image_size and not spec.any_resolution:
        raise UserError(f"data.side is {side}, but this tower takes {spec.image_size} px images only.")
    return side


def _rice_task(
    recipe: PretrainRecipe, tower: PreTrainedModel, cache: PixelCache, tokenizer: PreTrainedTokenizerBase | None
) -> _Task:
    classes = ObjectClasses.of(cache.records, recipe.data.object_labels, recipe.data.stuff)
    texts = TextClasses(tokenizer) if tokenizer is not None else None
    dataset = RegionDataset(cache, classes, texts, recipe.data.regions_per_image, recipe.data.augment, recipe.data.view)
    text_classes = len(texts) if texts else 0
    objective = RiceObjective(tower, len(classes), text_classes, recipe.model.rice, recipe.train.seed)
    if recipe.model.keep_heads:
        load_centres(objective, classes, _parent_run(recipe.model))

    centres: dict[str, torch.Tensor] = {}

    def save(folder: Path) -> None:
        _save_tower(objective.tower, folder)
        save_centres(centres, classes, folder)

    regions = sum(len(image.boxes) for image in dataset.labelled)
    about = f"{len(dataset)} of {len(cache)} images have labelled regions, {regions} in all; "
    about += f"{len(classes)} object classes; "
    if texts is None:
        about += "OCR regions are left out (data.tokenizer is not set)"
    else:
        with_text = sum(bool(ids) for image in dataset.labelled for ids in image.texts)
        about += f"{with_text} regions have text, {len(texts)} token classes"
    return _Task(
        objective,
        dataset,
        collate_regions,
        save,
        about,
        classes,
        before_save=lambda: centres.update(whole_centres(objective)),
    )


def _clip_task(
    recipe: PretrainRecipe, tower: PreTrainedModel, cache: PixelCache, tokenizer: PreTrainedTokenizerBase | None
) -> _Task:
    if tokenizer is None:
        raise UserError("the clip objective reads captions: set data.tokenizer to the folder of a tokenizer.")
    data = recipe.data
    dataset = CaptionDataset(cache, tokenizer, recipe.model.clip.max_tokens, data.augment, data.captions, data.view)
    objective = ClipObjective(tower, len(tokenizer), dataset.end_id, recipe.model.clip)
    if recipe.model.keep_heads:
        load_text_side(objective, _parent_run(recipe.model))

    def save(folder: Path) -> None:
        _save_tower(objective.tower, folder)
        save_text_side(objective, tokenizer, folder)

    return _Task(objective, dataset, dataset.collate, save, f"{len(dataset)} of {len(cache)} images have captions")


def _parent_run(model: PretrainModel) -> Path:
    if model.tower is None or not Path(model.tower).is_dir():
        raise UserError("model.keep_heads goes on with the heads of a finished run: set model.tower to its folder.")
    return Path(model.tower)


def _save_tower(tower: PreTrainedModel, folder: Path) -> None:
    tower.save_pretrained(folder)
    tower_image_processor(tower.config).save_pretrained(folder)


def _bad_records(records: RecordSet, cache: PixelCache) -> str:
    """Every record and image that was skipped, by name, so that none is lost without a word."""
    lines = [records.summary()]
    if cache.bad:
        lines.append(f"{len(cache.bad)} images cannot be read: " + "; ".join(bad.reason for bad in cache.bad))
    return "; ".join(lines) + "; "


def _vocabulary_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    return hashlib.sha256(json.dumps(tokenizer.get_vocab(), sort_keys=True).encode()).hexdigest()


def _add_metrics(result: StageResult, metrics: dict[str, float]) -> StageResult:
    stage = read_stage(result.run_dir)
    assert stage is not None  # the run has just finished
    write_stage(result.run_dir, {**stage, "metrics": {**stage["metrics"], **metrics}})
    return finished_result(result.run_dir)
