"""Stage 0: a vision tower trained on labelled regions (RICE), captions (CLIP), or words of regions (CLOC, UMG-CLIP)."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..mllm.boxes import mean_colour
from ..vision_towers import describe_tower, load_tower
from ..vision_towers.errors import UserError
from .engine import Part, StageResult, finished_result, join_processes, run_stage
from .engine.manifest import read_stage, write_stage
from .pixels import PixelCache
from .pretrain_eval import object_top1
from .pretrain_heads import CENTRES_FILE
from .pretrain_recipe import PretrainRecipe
from .pretrain_tasks import make_task, start_tower
from .record_io import RecordSet, data_hash
from .record_source import RecordSource
from .region_labels import open_tokenizer

CACHE_FOLDER = "pixel_cache"


def pretrain(recipe: PretrainRecipe, run_dir: str | Path, device: str = "auto", **options: Any) -> StageResult:
    """Train the tower of `recipe` in `run_dir` (resumed when it holds an unfinished run of the same recipe).

    The finished directory opens with `load_tower`. Beside the tower lie, for rice, `centres.safetensors` (`object`
    (K, D), `ocr` (V, D)) and `labels.json` (the classes' names), for clip `text_tower/` and `clip_heads.safetensors`;
    for cloc and umg_clip the directory is the whole `ClocModel` or `UmgClipModel` with its tokenizer.
    With `eval.records`, the result's metrics hold `held_out_object_top1` and `held_out_regions`.

    `options` go to `engine.run_stage`. Raises UserError for a recipe or data that cannot work.
    """
    run_dir = Path(run_dir)
    say = Console(stderr=True).print
    join_processes(device)  # the objective asks which classes are this process's
    torch.manual_seed(recipe.train.seed)
    tower = start_tower(recipe.model)
    side = _side(recipe, tower)
    tokenizer = open_tokenizer(recipe.data.tokenizer) if recipe.data.tokenizer else None
    records = recipe.data.read()
    cache_dir = Path(recipe.data.cache_dir) if recipe.data.cache_dir else run_dir / CACHE_FOLDER
    fill = mean_colour(describe_tower(tower.config).image_mean)
    cache = PixelCache.build(records, side, cache_dir, fill=fill)
    task = make_task(recipe, tower, cache, tokenizer)
    say(f"pretrain: {_bad_records(records, cache)}{task.about}", markup=False, highlight=False, soft_wrap=True)

    in_tower = Part("tower", (task.tower,), recipe.lr.tower)
    heads = tuple(name for name, _ in task.objective.named_parameters() if not in_tower.covers(name))
    parts = [in_tower, Part("heads", heads, recipe.lr.heads)]
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


def _side(recipe: PretrainRecipe, tower: PreTrainedModel) -> int:
    spec = describe_tower(tower.config)
    side = recipe.data.side or spec.image_size
    if side % spec.patch_size:
        raise UserError(f"data.side is {side}, it must be a multiple of the tower's patch size {spec.patch_size}.")
    if side != spec.image_size and not spec.any_resolution:
        raise UserError(f"data.side is {side}, but this tower takes {spec.image_size} px images only.")
    return side


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
