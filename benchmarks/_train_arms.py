"""What takes turns in `bench train`: our engine on packs and on grouped batches, and TRL's SFTTrainer."""

import copy
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from functools import partial
from io import StringIO
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlavaForConditionalGeneration, TrainerCallback

from regiontower.benchmarks._train_budget import grouped
from regiontower.benchmarks._train_samples import real_and_padded
from regiontower.mllm import RegionLlavaForConditionalGeneration, RegionLlavaProcessor, build_mllm, to_plain_llava
from regiontower.train_stages.engine import Part, StreamedDataset, run_stage
from regiontower.train_stages.engine.attention import attention_kernels
from regiontower.train_stages.learned_logits import learned_logits
from regiontower.train_stages.mllm_data import Sample, collate_samples, pad_id
from regiontower.train_stages.packed_attention import packed_attention
from regiontower.train_stages.packing import collate_packed
from regiontower.train_stages.train_config import TrainConfig
from regiontower.vision_towers import RiceVisionConfig, RiceVisionModel
from regiontower.vision_towers.pack_rows import pack_rows

CPU = torch.device("cpu")
LR = 1e-4
NANO_TOWER = {"hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 6}
VIT_B = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}


def tower(sizes: dict[str, int], image_size: int, patch_size: int) -> RiceVisionModel:
    """An untrained one: what it costs does not depend on what it knows."""
    return RiceVisionModel(RiceVisionConfig(**sizes, image_size=image_size, patch_size=patch_size))


def llama(tokenizer: Any, hidden: int, inner: int, layers: int, heads: int, kv_heads: int, vocab: int = 0) -> Any:
    """An untrained Llama with tied embeddings."""
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    config = LlamaConfig(
        vocab_size=max(vocab, len(tokenizer)),
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=end,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def packing_model(tokenizer: Any, small: bool) -> tuple[RegionLlavaForConditionalGeneration, RegionLlavaProcessor]:
    """nano's tower (64 image tokens) and a Llama of 30 million parameters; tiny ones to try the script out."""
    torch.manual_seed(0)
    sizes = NANO_TOWER | ({"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2} if small else {})
    language = llama(tokenizer, 64, 128, 2, 4, 4) if small else llama(tokenizer, 512, 1408, 9, 8, 8)
    return build_mllm(tower(sizes, 112, 14), language, tokenizer, projector="mlp")


@dataclass
class Watch(TrainerCallback):
    """Seconds from the end of one step to the end of the next, so waiting for the batch is in them; the first `skip`
    steps are left out."""

    skip: int = 1
    seconds: list[float] = field(default_factory=list)
    _last: float = 0.0
    _steps: int = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = time.perf_counter()
        self._steps += 1
        if self._steps > self.skip:
            self.seconds.append(now - self._last)
        self._last = now


@dataclass(frozen=True)
class Speed:
    """tokens: real ones a second. padding: padded over real tokens. step: mean seconds. pictures: a step."""

    tokens: float
    padding: float
    step: float
    pictures: float


@dataclass
class Counted:
    """A collate function that notes what it was given."""

    collate: Callable[[list], dict[str, torch.Tensor]]
    pad: int
    batches: list[tuple[int, int, int]] = field(default_factory=list)

    def __call__(self, items: list) -> dict[str, torch.Tensor]:
        batch = self.collate(items)
        pictures = len(batch["pixel_values"]) if "pixel_values" in batch else 0
        self.batches.append((*real_and_padded(batch, self.pad), pictures))
        return batch

    def speed(self, watch: Watch, batches: int = 1) -> Speed:
        """Of the steps that were timed, each of so many batches. A loader reads ahead: what it made last may not have
        been used."""
        used = self.batches[watch.skip * batches : (watch.skip + len(watch.seconds)) * batches]
        real, padded, pictures = (sum(column) for column in zip(*used, strict=True))
        seconds = sum(watch.seconds)
        steps = len(watch.seconds)
        return Speed(real / seconds, padded / real, seconds / steps, pictures / steps)


class Rows(StreamedDataset[list[Sample]]):
    """Prepared rows, round and round."""

    def __init__(self, rows: Sequence[list[Sample]]) -> None:
        self.rows = rows

    def examples(self, rank: int, processes: int) -> Iterator[list[Sample]]:
        return cycle(self.rows)

    def item(self, example: list[Sample]) -> list[Sample]:
        return example


def parts_of(model: Any) -> list[Part]:
    """The tower frozen, the rest trained."""
    return [
        Part("tower", ("model.vision_tower",), 0.0),
        Part("projector", ("model.multi_modal_projector",), LR),
        Part("region_projector", ("model.region_projector",), LR),
        Part("language_model", ("model.language_model", "lm_head"), LR),
    ]


def run_ours(
    model: Any,
    dataset: StreamedDataset,
    collate: Callable[[list], dict[str, torch.Tensor]],
    pad: int,
    *,
    batch_size: int,
    steps: int,
    around: AbstractContextManager[Any] | None = None,
    parts: list[Part] | None = None,
    on_batch: Any = learned_logits,
) -> Speed:
    """`steps` timed steps of our engine, in bf16."""
    watch, counted = Watch(), Counted(collate, pad)
    folder = Path(tempfile.mkdtemp())
    train = TrainConfig(
        steps=steps + watch.skip, batch_size=batch_size, precision="bf16", save_steps=10**6, log_steps=10**6
    )
    try:
        with quiet(), around or nullcontext():
            run_stage(
                model=model,
                parts=parts or parts_of(model),
                dataset=dataset,
                collate=counted,
                train=train,
                run_dir=folder,
                recipe=train,
                stage="instruct",
                parents={},
                data={},
                save=lambda folder: None,
                on_batch=on_batch,
                callbacks=[watch],
                device="cpu",
            )
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return counted.speed(watch)


def packed_rows(samples: list[Sample], budget: int) -> list[list[Sample]]:
    """Rows of at most `budget` tokens, in the order in which they are trained on."""
    rows = [[samples[index] for index in row] for row in pack_rows([len(s.ids) for s in samples], budget)]
    random.Random(0).shuffle(rows)
    return rows


def packed_arm(model: Any, processor: RegionLlavaProcessor, samples: list[Sample], budget: int, steps: int) -> Speed:
    """A packed row a step."""
    around = packed_attention(model.model.language_model, CPU)
    collate = partial(collate_packed, processor=processor)
    rows = Rows(packed_rows(samples, budget))
    return run_ours(model, rows, collate, pad_id(processor), batch_size=1, steps=steps, around=around)


@torch.no_grad()
def tower_share(
    model: Any, processor: RegionLlavaProcessor, samples: list[Sample], budget: int, packed: Speed
) -> float:
    """Of the time of a packed step: the tower alone, on pictures and boxes of rows that were timed."""
    seconds = []
    with attention_kernels(CPU, "bf16"), torch.autocast("cpu", torch.bfloat16):
        for row in packed_rows(samples, budget)[1:4]:
            batch = collate_packed([row], processor=processor)
            named = {name: batch[name] for name in ("boxes", "region_counts") if name in batch}
            began = time.perf_counter()
            model.model.vision_tower(batch["pixel_values"], **named, output_hidden_states=True)
            seconds.append(time.perf_counter() - began)
    return min(1.0, sum(seconds) / len(seconds) / packed.step)


def grouped_arm(model: Any, processor: RegionLlavaProcessor, samples: list[Sample], batch: int, steps: int) -> Speed:
    """Batches of `batch` samples of like lengths."""
    batches = grouped([len(sample.ids) for sample in samples], batch)
    rows = [[samples[index]] for members in batches for index in members]

    def collate(items: list) -> dict[str, torch.Tensor]:
        return collate_samples([sample for row in items for sample in row], processor=processor)

    return run_ours(model, Rows(rows), collate, pad_id(processor), batch_size=batch, steps=steps)


def peer_arm(
    model: Any, processor: RegionLlavaProcessor, samples: list[Sample], batch: int, steps: int, accumulate: int = 1
) -> Speed:
    """`steps` optimizer steps of TRL's SFTTrainer, each after `accumulate` batches, on a plain Llava of the same sizes,
    which is what it knows: the token of a region is any other token to it, and no region is read out. It gets pixels
    and ids ready made, and the attention of our engine, which is faster in bf16 on a CPU; so it is at its best."""
    from datasets import Dataset
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    watch = Watch()
    plain = copy.deepcopy(model)
    plain.requires_grad_(True)
    plain.model.vision_tower.requires_grad_(False)
    counted = Counted(partial(_peer_batch, samples, processor), pad_id(processor))
    folder = tempfile.mkdtemp()
    arguments = SFTConfig(
        output_dir=folder,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulate,
        max_steps=steps + watch.skip,
        learning_rate=LR,
        bf16=True,
        use_cpu=True,
        gradient_checkpointing=False,
        remove_unused_columns=False,
        max_length=None,
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    rows = Dataset.from_dict({"image": list(range(len(samples)))})
    try:
        with quiet(), attention_kernels(CPU, "bf16"):
            SFTTrainer(
                plain,
                arguments,
                data_collator=counted,
                train_dataset=rows,
                processing_class=processor,
                callbacks=[watch],
            ).train()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return counted.speed(watch, accumulate)


def plain_twin(model: RegionLlavaForConditionalGeneration, processor: RegionLlavaProcessor) -> Any:
    """The same model without regions, as transformers knows it."""
    folder = tempfile.mkdtemp()
    try:
        to_plain_llava(model, processor, folder)
        return LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _peer_batch(samples: list[Sample], processor: RegionLlavaProcessor, rows: list[dict]) -> dict[str, torch.Tensor]:
    """No attention mask, which would be slower: positions without a break mean causal attention to transformers."""
    batch = collate_samples([samples[row["image"]] for row in rows], processor=processor)
    for name in ("boxes", "region_counts"):
        batch.pop(name, None)
    ids = batch["input_ids"]
    ids[ids == processor.region_token_id] = processor.tokenizer.eos_token_id
    positions = torch.arange(ids.shape[1]).expand_as(ids).contiguous()
    return batch | {"position_ids": positions}


class quiet:
    """Progress and tables of a run that is only timed go nowhere."""

    def __enter__(self) -> None:
        self._stack = [redirect_stdout(StringIO()), redirect_stderr(StringIO())]
        for entry in self._stack:
            entry.__enter__()

    def __exit__(self, *error: Any) -> None:
        for entry in reversed(self._stack):
            entry.__exit__(*error)
