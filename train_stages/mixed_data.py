"""The data of a stage whose recipe mixes sources: what `run_stage` is given for it."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ..mllm.load import resolve_device
from ..mllm.processing import RegionLlavaProcessor
from ..vision_towers.errors import UserError
from .chat_stream import ChatStream, SizedChatStream, Windows, grouped, packed, plain, window_size
from .engine.attention import attention_kernels
from .feature_cache import (
    FeatureCache,
    as_encoder_outputs,
    blank_shape,
    feature_key,
    fill,
    wait_until_filled,
    wanted_pictures,
)
from .learned_logits import learned_logits
from .mixture import Mixture, mixture_hash, open_mixture
from .mixture_recipe import MixtureData
from .mllm_data import collate_samples
from .packed_attention import packed_attention
from .packing import collate_packed
from .train_config import TrainConfig

CACHE_FOLDER = "feature_cache"


@dataclass(frozen=True)
class StageData:
    """dataset, collate, on_batch: of `run_stage`. hashes: its `data`. about: a line for the user. around: the context
    that training needs. afterwards: a line about what became of the samples, empty when nothing is to be said."""

    dataset: Any
    collate: Callable[[list], Any]
    hashes: dict[str, str]
    about: str
    on_batch: Callable[[dict[str, Any], float], dict[str, Any]] = learned_logits
    around: Callable[[], AbstractContextManager[Any]] = field(default=nullcontext)
    afterwards: Callable[[], str] = field(default=str)


def mixed_data(
    data: MixtureData,
    model: Any,
    processor: RegionLlavaProcessor,
    train: TrainConfig,
    *,
    tower_trains: bool,
    run_dir: Path,
    device: str,
) -> StageData:
    """Open the sources, fill the feature cache when one is asked for, and arrange what is drawn.

    Raises:
        UserError: sources that cannot be read, choices that do not go together.
    """
    if data.batches == "packed" and processor.row_end:
        raise UserError("with model.row_end inputs have many sizes, and a pack takes one; set data.batches=plain.")
    mixture = open_mixture(data.sources, train.seed)
    stream = chat_stream(data, mixture, processor, train)
    place = torch.device(resolve_device("cuda" if device.startswith("cuda") else device))
    about = "an endless mixture" if mixture.endless else f"{mixture.size} samples"
    about += f" of {len(data.sources)} sources, {data.batches}"
    pictures, on_batch = None, learned_logits
    if data.feature_cache is not None:
        cache = _cache(data, data.feature_cache, mixture, model, processor, train, tower_trains, run_dir, place)
        stream.picture, pictures, on_batch = cache, cache.batch, _kept_and_learned
    around: Callable[[], AbstractContextManager[Any]] = nullcontext
    if data.batches == "packed":
        around = partial(packed_attention, model.model.language_model, place, dtype=_computed_in(train))
    collate = collate_packed if data.batches == "packed" else _collate_single

    def afterwards() -> str:
        tally = stream.windows.tally
        return tally.summary() if tally.bad or tally.masked else ""

    return StageData(
        stream,
        partial(collate, processor=processor, pictures=pictures),
        {"sources": mixture_hash(data.sources)},
        about,
        on_batch,
        around,
        afterwards,
    )


def chat_stream(data: MixtureData, mixture: Mixture, processor: RegionLlavaProcessor, train: TrainConfig) -> ChatStream:
    """The rows of a run, with decoded pictures."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    in_rows = data.batches == "packed"
    wanted = data.window if mixture.endless else min(data.window, mixture.size)
    size = wanted if in_rows else window_size(wanted, train.batch_size * processes)
    windows = Windows(mixture, processor, data.longest, size, train.seed, train.workers)
    arrange = packed(data.row_tokens) if in_rows else {"grouped": grouped, "plain": plain}[data.batches]
    # How many rows an epoch has is not looked up for nothing.
    sized = not mixture.endless and (train.epochs is not None or not in_rows)
    kind = SizedChatStream if sized else ChatStream
    return kind(windows, arrange, by_count=not in_rows, batch=train.batch_size)


def _computed_in(train: TrainConfig) -> torch.dtype:
    return torch.bfloat16 if train.precision == "bf16" else torch.float32


def _collate_single(rows: list, **options: Any) -> dict[str, torch.Tensor]:
    return collate_samples([sample for row in rows for sample in row], **options)


def _kept_and_learned(batch: dict[str, Any], progress: float) -> dict[str, Any]:
    return learned_logits(as_encoder_outputs(batch, progress), progress)


def _cache(
    data: MixtureData,
    kept_in: str,
    mixture: Mixture,
    model: Any,
    processor: RegionLlavaProcessor,
    train: TrainConfig,
    tower_trains: bool,
    run_dir: Path,
    device: torch.device,
) -> FeatureCache:
    for refused, why in (
        (tower_trains, "the tower is trained: its features change"),
        (processor.region_prompt == "overlay", "region_prompt is overlay: boxes are drawn into each picture anew"),
        (not processor.letterboxed, "pictures have different numbers of tokens (row ends, tiles)"),
        (mixture.endless, "a source is streamed: its pictures have no end"),
    ):
        if refused:
            raise UserError(f"data.feature_cache is {kept_in}, but {why}; set data.feature_cache=null.")
    key = feature_key(model, processor, kept_in, train.precision)
    folder = key.folder(Path(data.cache_dir) if data.cache_dir else run_dir / CACHE_FOLDER)
    shape = (*blank_shape(model, processor), model.config.region_dim)
    filled = folder / f"filled-{mixture_hash(data.sources)[:16]}"
    if int(os.environ.get("RANK", "0")):
        wait_until_filled(folder, filled)  # the first process may take longer than a barrier waits
        return FeatureCache(folder, kept_in, *shape)
    cache = FeatureCache(folder, kept_in, *shape)
    with ExitStack() as computing:
        computing.enter_context(torch.autocast(device.type, torch.bfloat16, enabled=train.precision == "bf16"))
        computing.enter_context(attention_kernels(device, train.precision))
        fill(cache, model, processor, wanted_pictures(mixture.everything(), processor), device=device, say=say)
    filled.touch()
    return cache


def say(text: str) -> None:
    """A line on stderr, of the first process alone."""
    if int(os.environ.get("RANK", "0")):
        return
    Console(stderr=True).print(text, markup=False, highlight=False, soft_wrap=True)
