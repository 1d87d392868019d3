"""Stage 0: a vision tower trained on labelled regions (RICE), captions (CLIP), or words of regions (CLOC, UMG-CLIP)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ..mllm.boxes import mean_colour
from ..vision_towers import TowerSpec, describe_tower
from .engine import HeldOut, Part, StageResult, join_processes, run_stage
from .pixels import PixelCache
from .pretrain_eval import Probe, held_out_figures
from .pretrain_heads import vocabulary_hash
from .pretrain_items import CachedItems
from .pretrain_recipe import PretrainRecipe
from .pretrain_tasks import make_task, start_tower
from .record_io import RecordSet, data_hash
from .record_source import RecordSource
from .region_labels import open_tokenizer
from .streaming import RecordStream, StreamedItems
from .view_schedule import check_size, view_schedule

CACHE_FOLDER = "pixel_cache"


def pretrain(
    recipe: PretrainRecipe,
    run_dir: str | Path,
    device: str = "auto",
    *,
    probe: Probe | None = None,
    **options: Any,
) -> StageResult:
    """Train the tower of `recipe` in `run_dir` (resumed when it holds an unfinished run of the same recipe).

    The finished directory opens with `load_tower`. Beside the tower lie, for rice, `centres.safetensors` (`object`
    (K, D), `ocr` (V, D)) and `labels.json` (the classes' names), for clip `text_tower/` and `clip_heads.safetensors`;
    for cloc and umg_clip the directory is the whole `ClocModel` or `UmgClipModel` with its tokenizer.
    With `eval.records`, the result's metrics hold `held_out_loss`, for rice `held_out_object_top1` and
    `held_out_regions`, and `held_out_...` of what `probe` finds; see `pretrain_eval.held_out_figures`.

    probe: measures the tower on the pixels of `eval.records`.
    `options` go to `engine.run_stage`. Raises UserError for a recipe or data that cannot work.
    """
    run_dir, data = Path(run_dir), recipe.data
    say = Console(stderr=True).print
    join_processes(device)  # the objective asks which classes are this process's
    torch.manual_seed(recipe.train.seed)
    tower = start_tower(recipe.model)
    spec = describe_tower(tower.config)
    side, fill = _side(recipe, spec), mean_colour(spec.image_mean)
    on_batch = view_schedule(data.view_schedule, data.view or side, spec) if data.view_schedule else None
    tokenizer = open_tokenizer(data.tokenizer) if data.tokenizer else None
    cache_dir = Path(data.cache_dir) if data.cache_dir else run_dir / CACHE_FOLDER
    if data.stream:
        stream = RecordStream(data, recipe.train.seed, data.shuffle_buffer)
        task = make_task(recipe, tower, stream.records(), tokenizer)
        dataset, hashes = StreamedItems(stream, task.items, side, fill), {"records": stream.hash()}
        about = "images are streamed"
    else:
        records = data.read()
        cache = PixelCache.build(records, side, cache_dir, fill=fill)
        task = make_task(recipe, tower, cache.records, tokenizer)
        dataset, hashes = CachedItems(cache, task.items), {"records": data_hash(records)}
        about = f"{_bad_records(records, cache)}{len(dataset)} of {len(cache)} images have {task.about(dataset.known)}"
    about = "; ".join(part for part in (about, task.labels) if part)
    say(f"pretrain: {about}", markup=False, highlight=False, soft_wrap=True)
    if tokenizer is not None:
        hashes["tokenizer"] = vocabulary_hash(tokenizer)

    held_out = None
    if recipe.eval.records is not None:
        read = RecordSource(recipe.eval.records, recipe.eval.root, recipe.eval.format).read()
        held_out_cache = PixelCache.build(read, side, cache_dir, fill=fill)
        measure = held_out_figures(task, held_out_cache, recipe.eval.batch_size, probe)
        held_out = HeldOut(measure, recipe.eval.every)

    in_tower = Part("tower", (task.tower,), recipe.lr.tower)
    heads = tuple(name for name, _ in task.objective.named_parameters() if not in_tower.covers(name))
    parts = [in_tower, Part("heads", heads, recipe.lr.heads)]
    return run_stage(
        model=task.objective,
        parts=parts,
        dataset=dataset,
        collate=task.items.collate,
        train=recipe.train,
        run_dir=run_dir,
        recipe=recipe,
        stage="pretrain",
        parents={"tower": recipe.model.tower} if recipe.model.tower else {},
        data=hashes,
        save=task.save,
        before_save=task.before_save,
        held_out=held_out,
        on_batch=on_batch,
        find_unused=True,  # any tower: CLIP's last norm, DINOv2's mask token and others have no part in region losses
        device=device,
        **options,
    )


def _side(recipe: PretrainRecipe, spec: TowerSpec) -> int:
    """Pixels of the letterboxed square; that of the views is looked at too."""
    side = recipe.data.side or spec.image_size
    check_size("data.side", side, spec)
    check_size("data.view", recipe.data.view or side, spec)
    return side


def _bad_records(records: RecordSet, cache: PixelCache) -> str:
    """Every record and image that was skipped, by name, so that none is lost without a word."""
    lines = [records.summary()]
    if cache.bad:
        lines.append(f"{len(cache.bad)} images cannot be read: " + "; ".join(bad.reason for bad in cache.bad))
    return "; ".join(lines) + "; "
