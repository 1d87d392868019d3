"""A RegionLlava trained by two gloo processes: DDP by the engine, FSDP2 by `fully_shard`, beside one process."""

from __future__ import annotations

import multiprocessing
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from regiontower.mllm import RegionLlavaProcessor, load_mllm
from regiontower.mllm.load import RegionMLLM
from regiontower.train_stages.engine import Part, apply_parts, run_stage
from regiontower.train_stages.engine.audit import MoveAudit
from regiontower.train_stages.engine.optimizers import build_optimizer
from regiontower.train_stages.engine.parts import parameter_groups
from regiontower.train_stages.engine.run_log import LOG_FILE, LogRow, read_rows
from regiontower.train_stages.engine.seeded_data import EpochSampler
from regiontower.train_stages.engine.whole_model import is_sharded, make_whole
from regiontower.train_stages.lora import LoraRecipe, add_lora
from regiontower.train_stages.mllm_stage import InstructRecipe, LearningRates, instruct
from regiontower.train_stages.recipe import TrainConfig, load_recipe
from regiontower.train_stages.scenes import write_scenes
from regiontower.train_stages.tuning import LayerDecay, save_tuned, tuned_parts

pytestmark = pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork")

PROMPTS = {
    "regions": "<image>What is in <region>? a red star",
    "image": "<image>Where is the red star? [12, 345, 678, 1000]",
    "text": "What is in it? a blue heart none",
}


def losses(run_dir: Path) -> list[float]:
    return [row.loss for row in read_rows(run_dir / LOG_FILE, LogRow)]


# ---- the same recipe ----


def by_recipe(
    rank: int, mllm: Path, scenes: Path, run_dir: Path, batch_size: int, steps: int, lora: dict | None
) -> None:
    recipe = load_recipe(
        {
            "model": {"mllm": str(mllm)},
            "data": {"records": str(scenes), "turns": 3, "cache_dir": str(scenes.parent / "pixels")},
            "lr": {"tower": 0.01, "projector": 0.05, "region_projector": 0.05, "language_model": 0.05},
            "lora": lora,
            "train": {
                "steps": steps,
                "batch_size": batch_size,
                "optimizer": "sgd",
                "log_steps": 1,
                "threads": 1,
            },
        },
        InstructRecipe,
    )
    instruct(recipe, run_dir, device="cpu")


@pytest.mark.parametrize(
    ("steps", "lora"),
    [
        pytest.param(50, None, id="full", marks=pytest.mark.slow),
        pytest.param(12, None, id="full-12"),
        pytest.param(6, {"rank": 2}, id="lora"),
    ],
)
def test_the_first_50_losses_are_those_of_one_process(in_processes, tiny_mllm_dir, tmp_path, steps, lora):
    """Same recipe, same global batch of 4, fp32, SGD, no dropout: 1e-4 relative. Answers differ in length, so a mean
    over each process's own tokens would not do. All 50: `pytest -n 0 -m slow tests/train_stages`."""
    scenes = write_scenes(tmp_path / "scenes", 12, 0, preset="easy", progress=False)
    by_recipe(0, tiny_mllm_dir, scenes, tmp_path / "one", 4, steps, lora)
    in_processes(2, by_recipe, tiny_mllm_dir, scenes, tmp_path / "two", 2, steps, lora)
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(one) == len(two) == len(set(one)) == steps
    assert steps < 50 or sum(one[-5:]) < sum(one[:5])  # it learns, so equal losses mean equal steps
    assert two == pytest.approx(one, rel=1e-4)


# ---- text-only beside images ----


@dataclass
class Recipe:
    train: TrainConfig


class Mixed(torch.utils.data.Dataset):
    """A third with a region, a third with a picture alone, a third without any picture."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> int:
        return index

    @staticmethod
    def kind(index: int) -> str:
        return list(PROMPTS)[index % 3]


def one_batch(indices: list[int], processor) -> dict[str, torch.Tensor]:
    (index,) = indices
    kind = Mixed.kind(index)
    pixels = torch.randint(0, 256, (90, 120, 3), generator=torch.Generator().manual_seed(index), dtype=torch.uint8)
    pictures = None if kind == "text" else [Image.fromarray(pixels.numpy())]
    boxes = [[(10 + index, 10, 60, 60)]] if kind == "regions" else None
    inputs = dict(processor(pictures, [PROMPTS[kind]], boxes=boxes))
    return inputs | {"labels": inputs["input_ids"]}


def by_engine(rank: int, mllm: Path, run_dir: Path, grad_accum: int) -> None:
    config = TrainConfig(
        steps=5, batch_size=1, grad_accum=grad_accum, optimizer="sgd", log_steps=1, threads=1, schedule="constant"
    )
    model, processor = load_mllm(mllm, device="cpu")
    run_stage(
        model=model,
        parts=tuned_parts(model, asdict(LearningRates(tower=0.01, language_model=0.01)), LayerDecay()),
        dataset=Mixed(),
        collate=partial(one_batch, processor=processor),
        train=config,
        run_dir=run_dir,
        recipe=Recipe(config),
        stage="instruct",
        parents={},
        data={},
        save=model.save_pretrained,
        device="cpu",
    )


def test_complaint_11_text_only_batches_beside_images_neither_hang_nor_change_the_result(
    in_processes, tiny_mllm_dir, tmp_path
):
    """LLaVA #699, #1759: the rank without an image waited for ever for the other's gradients of the tower."""
    order = [Mixed.kind(index) for index in EpochSampler(12, 0)][:10]
    pairs = {frozenset(pair) for pair in zip(order[::2], order[1::2], strict=True)}
    assert any("text" in pair and len(pair) == 2 for pair in pairs)  # what one process sees the other does not
    by_engine(0, tiny_mllm_dir, tmp_path / "one", 2)
    in_processes(2, by_engine, tiny_mllm_dir, tmp_path / "two", 1)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert all(torch.allclose(one[name], two[name], rtol=1e-4, atol=1e-6) for name in one)


# ---- FSDP2 ----

STEPS = 3


def steps(model: nn.Module, processor, batches_of: list[list[int]], parts: list[Part]) -> list[float]:
    """SGD as the engine sets it up, with its check after step 1; sums over tokens, as several processes need them."""
    apply_parts(model, parts)
    optimizer = build_optimizer(parameter_groups(model, parts, 0.0), TrainConfig(steps=1, optimizer="sgd"), "cpu")
    for group in optimizer.param_groups:
        group["lr"] = 0.05
    audit: MoveAudit | None = MoveAudit(model, parts)
    found = []
    for number, indices in enumerate(batches_of, start=1):
        total = 0.0
        for index in indices:
            loss = model(**one_batch([index], processor)).loss / len(indices)
            loss.backward()
            total += loss.item()
        optimizer.step()
        if audit is not None and audit.check(number) is not None:
            audit = None
        optimizer.zero_grad()
        found.append(total)
    assert audit is None
    return found


@dataclass(frozen=True)
class Tuning:
    """What trains; lora: rank of adapters in the language model."""

    rates: LearningRates
    lora: int | None = None

    def open(self, mllm: Path) -> tuple[RegionMLLM, RegionLlavaProcessor, list[Part]]:
        model, processor = load_mllm(mllm, device="cpu")
        lora = None if self.lora is None else LoraRecipe(rank=self.lora)
        if lora is not None:
            torch.manual_seed(0)
            add_lora(model, lora)
        return model, processor, tuned_parts(model, asdict(self.rates), LayerDecay(), lora)


FROZEN_LANGUAGE = Tuning(LearningRates(tower=1.0, projector=1.0, region_projector=1.0))
EVERYTHING = Tuning(LearningRates(tower=1.0, projector=1.0, region_projector=1.0, language_model=1.0))
ADAPTERS = Tuning(LearningRates(projector=1.0, region_projector=1.0, language_model=1.0), lora=2)
PROJECTORS = {"multi_modal_projector", "region_projector"}


def sharded(rank: int, mllm: Path, out: Path, tuning: Tuning) -> dict:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    model, processor, parts = tuning.open(mllm)
    mesh = init_device_mesh("cpu", (2,))
    kinds = model._no_split_modules
    blocks = [module for module in model.modules() if type(module).__name__ in kinds]
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model.train(), mesh=mesh)
    # Trainer and accelerate fall back to DDP on a CPU without a word; these are shards.
    assert len(blocks) == 4 + 2 and all(isinstance(parameter, DTensor) for parameter in model.parameters())
    assert any(parameter.to_local().numel() < parameter.numel() for parameter in model.parameters())
    found = steps(model, processor, [[2 * step + rank] for step in range(STEPS)], parts)
    assert is_sharded(model)
    make_whole(model, model, None, keep=rank == 0)
    if rank == 0:
        assert not is_sharded(model) and model.lm_head.weight is model.get_input_embeddings().weight
        save_tuned(model, processor, out, None if tuning.lora is None else str(mllm))
    return {"losses": found}


@pytest.mark.parametrize(
    ("tuning", "moving"),
    [
        pytest.param(FROZEN_LANGUAGE, {"vision_tower", *PROJECTORS}, id="frozen-language"),
        pytest.param(EVERYTHING, {"vision_tower", "language_model", *PROJECTORS}, id="everything"),
        pytest.param(ADAPTERS, {"language_model", *PROJECTORS}, id="lora"),
    ],
)
def test_fsdp2_equals_one_process_and_is_saved_whole(in_processes, tiny_mllm_dir, tmp_path, tuning, moving):
    model, processor, parts = tuning.open(tiny_mllm_dir)
    alone = steps(model.train(), processor, [[2 * step, 2 * step + 1] for step in range(STEPS)], parts)
    first, second = in_processes(2, sharded, tiny_mllm_dir, tmp_path / "out", tuning)
    together = [(a + b) / 2 for a, b in zip(first["losses"], second["losses"], strict=True)]
    assert together == pytest.approx(alone, rel=1e-4)
    saved, _ = load_mllm(tmp_path / "out", device="cpu")
    before, _, _ = tuning.open(tiny_mllm_dir)
    expected, start = dict(model.named_parameters()), dict(before.named_parameters())
    found = dict(saved.named_parameters())
    assert found.keys() == expected.keys()
    for name, parameter in found.items():
        torch.testing.assert_close(parameter, expected[name], rtol=1e-4, atol=1e-5)
    moved = [name for name in expected if not torch.equal(expected[name], start[name])]
    assert {name.split(".")[1] for name in moved} == moving
    if tuning.lora is not None:
        assert all(".lora_" in name for name in moved if "language_model" in name)
