"""Alignment with and without kept features, from the second epoch on: the cache is filled before what is timed."""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from regiontower.benchmarks._train_arms import CPU, LR, NANO_TOWER, VIT_B, Speed, llama, quiet, run_ours, tower
from regiontower.mllm import build_mllm
from regiontower.train_stages.engine import Part
from regiontower.train_stages.engine.attention import attention_kernels
from regiontower.train_stages.mixed_data import mixed_data
from regiontower.train_stages.mixture_recipe import MixtureData, MixtureSource
from regiontower.train_stages.mllm_data import pad_id
from regiontower.train_stages.pretrain_lm import LMModelConfig, build_lm
from regiontower.train_stages.train_config import TrainConfig

MIX = {"classify": 2.0, "region_caption": 2.0, "referring": 2.0, "grounding": 1.0}
BATCH = {"vitb_nano": 32, "vitb_135m": 8}  # those of align-nano and align-smollm2


def align_model(name: str, tokenizer: Any, small: bool) -> tuple[Any, Any]:
    """A tower of ViT-B/16's size at 224 px, before nano's language model or one of SmolLM2-135M's sizes."""
    torch.manual_seed(0)
    sizes = NANO_TOWER if small else VIT_B
    if name == "vitb_nano":
        language: Any = build_lm(LMModelConfig(), tokenizer)
    elif small:
        language = llama(tokenizer, 128, 256, 4, 4, 2)
    else:
        language = llama(tokenizer, 576, 1536, 30, 9, 3, vocab=49152)
    return build_mllm(tower(sizes, 112 if small else 224, 14 if small else 16), language, tokenizer)


class CacheArms:
    """Both ways of one model.

    live, cached: -> the speed of a few steps, data loading included. limit: -> what a cache that costs nothing would
    bring.
    """

    def __init__(self, name: str, tokenizer: Any, records: Path, folder: str, steps: int, small: bool) -> None:
        self.model, self.processor = align_model(name, tokenizer, small)
        self.steps, self.batch = steps, BATCH[name]
        self.parts = [
            Part("tower", ("model.vision_tower",), 0.0),
            Part("projector", ("model.multi_modal_projector",), LR),
            Part("region_projector", ("model.region_projector",), LR),
            Part("language_model", ("model.language_model", "lm_head"), 0.0),
        ]
        self.live = self._arm(None, records, folder)
        self.cached = self._arm("bf16", records, folder)

    def _arm(self, cache: str | None, records: Path, folder: str) -> Callable[[], Speed]:
        source = MixtureSource(str(records), mix=MIX, turns=3)
        data = MixtureData((source,), feature_cache=cache, cache_dir=folder)  # pyright: ignore[reportArgumentType]
        train = TrainConfig(steps=1, batch_size=self.batch, precision="bf16")
        with quiet():
            made = mixed_data(
                data, self.model, self.processor, train, tower_trains=False, run_dir=Path(folder), device="cpu"
            )

        def run() -> Speed:
            return run_ours(
                self.model,
                made.dataset,
                made.collate,
                pad_id(self.processor),
                batch_size=self.batch,
                steps=self.steps,
                parts=self.parts,
                on_batch=made.on_batch,
            )

        return run

    @torch.no_grad()
    def limit(self, live: Speed) -> float:
        """(tower + rest) / rest: a step with the tower over what is left of it without the tower's time."""
        inner, side = self.model.model, self.processor.image_size
        pixels = torch.randn(self.batch, 3, side, side)
        boxes = torch.tensor([[1.0, 1.0, 60.0, 60.0]]).expand(self.batch, 2, 4)
        seconds = []
        with attention_kernels(CPU, "bf16"), torch.autocast("cpu", torch.bfloat16):
            for _ in range(3):
                began = time.perf_counter()
                inner.vision_tower(pixels, boxes=boxes.contiguous(), output_hidden_states=True)
                seconds.append(time.perf_counter() - began)
        tower = statistics.median(seconds)
        return live.step / max(live.step - tower, 1e-3 * live.step)


def temporary() -> tempfile.TemporaryDirectory:
    """For scenes and features; removed at the end."""
    return tempfile.TemporaryDirectory(prefix="bench-train-")
