"""Resume of LLaVA-like models, whose tensors have other names on disk than in memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    TrainerCallback,
)

from regiontower.train_stages.engine import Part, StageInterrupted, run_stage
from regiontower.train_stages.engine.checkpoint_files import write_digest
from regiontower.train_stages.recipe import TrainConfig
from regiontower.vision_towers.errors import UserError

IMAGE_TOKEN = 7


@dataclass(frozen=True)
class LlavaRecipe:
    train: TrainConfig


def tiny_llava(seed: int) -> LlavaForConditionalGeneration:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**sizes, image_size=16, patch_size=8),
        text_config=LlamaConfig(**sizes, vocab_size=32, num_key_value_heads=2, tie_word_embeddings=True),
        image_token_id=IMAGE_TOKEN,
        image_seq_length=4,
    )
    return LlavaForConditionalGeneration(config)


def llava_rows(count: int = 10) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    rows = []
    for _ in range(count):
        text = torch.randint(8, 32, (6,), generator=generator)
        ids = torch.cat([torch.tensor([1, *[IMAGE_TOKEN] * 4]), text])
        labels = torch.where(ids == IMAGE_TOKEN, -100, ids)
        rows.append({"input_ids": ids, "labels": labels, "pixel_values": torch.randn(3, 16, 16, generator=generator)})
    return rows


def stack(items: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.stack([item[name] for item in items]) for name in items[0]}


class StopAt(TrainerCallback):
    """A Ctrl-C in the given step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        import signal

        if state.global_step + 1 == self.step:
            signal.raise_signal(signal.SIGINT)


TRAIN = TrainConfig(steps=8, batch_size=2, grad_accum=2, log_steps=2, save_steps=4)


def run(run_dir: Path, model: PreTrainedModel, rows: list, collate: Callable = stack, callbacks=()) -> None:
    names = {name.split(".")[1] for name, _ in model.named_parameters() if name.startswith("model.")}
    frozen = Part("tower", ("model.vision_tower",), 0.0)
    rest = Part("rest", tuple(f"model.{name}" for name in sorted(names - {"vision_tower"})), 3e-3)
    run_stage(
        model=model,
        parts=[frozen, rest],
        dataset=rows,
        collate=collate,
        train=TRAIN,
        run_dir=run_dir,
        recipe=LlavaRecipe(TRAIN),
        stage="align",
        parents={},
        data={},
        save=model.save_pretrained,
        callbacks=callbacks,
        device="cpu",
    )


def assert_resume_is_exact(tmp_path: Path, make: Callable[[int], PreTrainedModel], rows, collate=stack) -> None:
    straight, resumed = make(0), make(5)  # other weights: what is not restored shows, frozen parts too
    run(tmp_path / "straight", straight, rows, collate)
    with pytest.raises(StageInterrupted):
        run(tmp_path / "resumed", make(0), rows, collate, callbacks=[StopAt(4)])
    run(tmp_path / "resumed", resumed, rows, collate)
    expected = straight.state_dict()
    for name, tensor in resumed.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    files = [load_file(tmp_path / name / "model.safetensors") for name in ("straight", "resumed")]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])


def test_clip_llava_resumes_to_the_bit_and_reloads(tmp_path):
    assert_resume_is_exact(tmp_path, tiny_llava, llava_rows())
    trained = LlavaForConditionalGeneration.from_pretrained(tmp_path / "resumed")
    checkpoint = LlavaForConditionalGeneration.from_pretrained(tmp_path / "resumed" / "checkpoints" / "step_8")
    fresh = tiny_llava(0)
    changed = 0
    for (name, one), (_, other) in zip(trained.named_parameters(), checkpoint.named_parameters(), strict=True):
        assert torch.equal(one, other), name
        changed += not torch.equal(one, fresh.get_parameter(name))
    assert changed == sum("vision_tower" not in name for name, _ in trained.named_parameters())


def test_region_llava_resumes_to_the_bit(tmp_path, make_tiny_mllm, noise_image):
    _, processor = make_tiny_mllm()

    def collate(items: list) -> dict[str, torch.Tensor]:
        images, texts, boxes = zip(*items, strict=True)
        batch = processor(images=list(images), text=list(texts), boxes=list(boxes), padding=True)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        return dict(batch) | {"labels": labels}

    rows = [
        (noise_image(seed=i), f"{processor.image_token}What is in {processor.region_token}?", [(5, 5, 40 + i, 50)])
        for i in range(6)
    ]
    assert_resume_is_exact(tmp_path, lambda seed: make_tiny_mllm(seed=seed)[0], rows, collate)


def test_a_checkpoint_that_does_not_fit_is_an_error_not_a_warning(tmp_path):
    with pytest.raises(StageInterrupted):
        run(tmp_path / "run", tiny_llava(0), llava_rows(), callbacks=[StopAt(4)])
    file = tmp_path / "run" / "checkpoints" / "step_4" / "model.safetensors"
    tensors = {name.replace("model.vision_tower", "vision_tower"): tensor for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    write_digest(file.parent)  # whole, but of another model
    with pytest.raises(UserError, match=r"checkpoint does not fit the model \(\d+ tensors missing, \d+ unknown"):
        run(tmp_path / "run", tiny_llava(0), llava_rows())
