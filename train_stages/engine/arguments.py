"""A recipe's `train` block as transformers' TrainingArguments, and what several processes agree on before training."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from transformers import TrainingArguments

from ...vision_towers.errors import UserError
from ..train_config import TrainConfig

T = TypeVar("T")


def join_processes(device: str) -> None:
    """Set up torch.distributed under torchrun; nothing in a single process. For what is built before the training.

    Raises:
        UserError: the device is not there.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        use_cpu = _uses_cpu(device)
        PartialState(cpu=use_cpu, backend="gloo" if use_cpu else None)


def training_arguments(
    train: TrainConfig, folder: Path, samples: int | None, device: str, find_unused: bool = False
) -> TrainingArguments:
    """Arguments for `StageTrainer`; also sets up torch.distributed under torchrun.

    Args:
        folder: where checkpoints go.
        samples: length of the dataset, None for one without. A last batch that is not full is dropped, except where it
            would be the only one.
        device: auto, cpu, cuda or mps.
        find_unused: some parameters that train have no part in the loss, and DDP must not wait for their gradients.

    Raises:
        UserError: the device is not there.
    """
    use_cpu = _uses_cpu(device)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    args = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=train.batch_size,
        gradient_accumulation_steps=train.grad_accum,
        max_grad_norm=train.max_grad_norm,
        bf16=train.precision == "bf16",
        seed=train.seed,
        data_seed=train.seed,
        save_strategy="steps",
        save_steps=train.save_steps,
        logging_steps=train.log_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # it would hide a NaN behind the mean of earlier losses
        disable_tqdm=True,
        report_to=list(train.report_to),
        remove_unused_columns=False,
        dataloader_num_workers=train.workers,
        dataloader_pin_memory=not use_cpu and torch.cuda.is_available(),
        dataloader_drop_last=samples is None or samples >= train.batch_size * processes,
        use_cpu=use_cpu,
        ddp_backend="gloo" if use_cpu and processes > 1 else None,
        ddp_find_unused_parameters=find_unused,
    )
    if args.device.type == "cuda" and processes == 1:
        args._n_gpu = 1  # several visible GPUs would make Trainer use nn.DataParallel; torchrun is the way to use them
    return args


def _uses_cpu(device: str) -> bool:
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if device == "auto":
        return not (there["cuda"] or there["mps"])
    if device.startswith("cuda:"):
        number = device.removeprefix("cuda:")
        if number != "0":
            raise UserError(f"Training cannot be sent to {device}; set CUDA_VISIBLE_DEVICES={number} and use cuda.")
        device = "cuda"
    if device not in there:
        raise UserError(f"Unknown device {device!r}; use auto, cpu, cuda or mps.")
    if not there[device]:
        raise UserError(f"This machine has no {device} device; use --device auto or cpu.")
    return device == "cpu"


def decided_by_first(args: TrainingArguments, decide: Callable[[], T]) -> T:
    """Run `decide` in process 0 alone and give its result, or its UserError, to every process."""
    outcome: list = [None, None]
    if args.process_index == 0:
        try:
            outcome[0] = decide()
        except UserError as error:
            outcome[1] = str(error)
    if args.world_size > 1:
        dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise UserError(outcome[1])
    return outcome[0]
