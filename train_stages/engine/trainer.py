"""transformers' Trainer with learning rates per part, resume that restores weights, and our checkpoints."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence, Sized
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from huggingface_hub import save_torch_state_dict
from torch import nn
from torch.utils.data import DataLoader, Sampler
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ...vision_towers.errors import UserError
from ..atomic_write import sync
from ..train_config import TrainConfig
from .audit import local_part
from .checkpoint_files import write_digest
from .cutting import before_cutting
from .optimizers import build_optimizer
from .parts import Part, adapter_dropouts, frozen_modules, frozen_names, parameter_groups
from .refusals import raise_refusals
from .run_log import LogRow
from .schedule import Clock, lr_lambda
from .seeded_data import EpochSampler
from .shards import (
    SHARDS_FOLDER,
    class_shards,
    clip_shards,
    leave_to_model,
    load_shards,
    save_shards,
    shared_parameters,
    without_shards,
)
from .streamed import SeededStream, StreamSampler
from .throughput import Throughput

CLOCK_FILE = "clock.json"
KEPT_CHECKPOINTS = 2


class StageTrainer(Trainer):
    """The engine's Trainer. `run_stage` builds it; a stage does not need it by hand."""

    def __init__(
        self,
        *,
        model: nn.Module,
        args: TrainingArguments,
        train: TrainConfig,
        parts: Sequence[Part],
        clock: Clock,
        dataset: Any,
        collate: Callable[[list], Any],
        on_batch: Callable[[dict[str, Any], float], dict[str, Any]] | None,
        callbacks: Sequence[TrainerCallback],
        on_row: Callable[[LogRow], None],
        throughput: Throughput,
        trained_only: bool = False,
    ) -> None:
        self._train, self._parts, self._clock, self._on_row = train, parts, clock, on_row
        self._on_batch = on_batch
        self._frozen = frozen_modules(model, parts)
        self._live = adapter_dropouts(model, parts)
        self.throughput = throughput
        self._left_out = frozen_names(model, parts) if trained_only else frozenset()
        self._sampler: EpochSampler | None = None
        self._metrics: dict[str, list[float | torch.Tensor]] = {}
        # Part (its hidden matrices apart: part.muon) -> learning rate of the step just taken.
        self.lr_used: dict[str, float] = {}
        leave_to_model(model)
        super().__init__(model, args, collate, dataset, callbacks=list(callbacks))  # pyright: ignore[reportArgumentType]
        self.remove_callback(PrinterCallback)  # it prints every log to stdout
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            before_cutting(model, getattr(self.accelerator.state, "fsdp_plugin", None))

    def bare_model(self) -> nn.Module:
        """The model without what accelerate wraps around it."""
        assert self.model is not None
        return self.accelerator.unwrap_model(self.model)

    # ---- data ----

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if not isinstance(dataset, Sized):
            return None
        self._sampler = EpochSampler(len(dataset), self._train.seed)
        return self._sampler

    def get_train_dataloader(self) -> DataLoader:
        """For a stream, one that begins where this run does. accelerate is left out: each process streams its own part,
        which accelerate would divide again."""
        stream = self.train_dataset
        if not isinstance(stream, SeededStream):
            return super().get_train_dataloader()
        first = self._clock.step * self._train.batch_size * self._train.grad_accum
        return DataLoader(
            stream,
            batch_size=self._train.batch_size,
            sampler=StreamSampler(stream.stream, first, self.args.process_index, self.args.world_size),
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
            # The loader draws a seed of its own when it begins, which a resumed run does once more.
            generator=torch.Generator().manual_seed(self._train.seed),
        )

    def begin_epoch(self, epoch: int) -> None:
        """Tell sampler and dataset the epoch.

        Trainer and accelerate tell them too, but not where a resumed run skips batches: accelerate then reaches the
        sampler or the dataset, not both, and behind the shards of several processes neither.
        """
        for follower in (self._sampler, self.train_dataset):
            if hasattr(follower, "set_epoch"):
                follower.set_epoch(epoch)  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue]

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        batches = self.throughput.timed(raise_refusals(epoch_iterator))
        return super().get_batch_samples(batches, num_batches, device)

    # ---- optimizer ----

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            groups = parameter_groups(
                model or self.bare_model(),
                self._parts,
                self._train.weight_decay,
                muon_lr=self._train.muon_lr if self._train.optimizer == "muon" else None,
            )
            cut_later = self.is_fsdp_enabled or self.is_deepspeed_enabled  # by accelerate, once there is an optimizer
            self.optimizer = build_optimizer(groups, self._train, self.args.device.type, cut_later)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        if self.lr_scheduler is None:
            inner = self.optimizer if optimizer is None else optimizer
            assert inner is not None
            inner = _inner(inner)
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(inner, lr_lambda(self._train, self._clock))
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def note_learning_rates(self) -> None:
        """To be called between the optimizer's step and the scheduler's."""
        assert self.optimizer is not None
        self.lr_used = {}
        for group in self.optimizer.param_groups:  # with layer decay a part has several rates: the highest is noted
            name = group["part"] + ("" if group["method"] == "adamw" else f".{group['method']}")
            self.lr_used[name] = max(self.lr_used.get(name, 0.0), float(group["lr"]))

    # ---- the step ----

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        for module in self._frozen:  # training_step has just put the whole model in train mode
            module.eval()
        for module in self._live:
            module.train()
        if self._on_batch is not None:
            inputs = self._on_batch(inputs, self._clock.progress())
        self.throughput.add(inputs)
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        metrics = outputs.get("metrics") if isinstance(outputs, Mapping) else getattr(outputs, "metrics", None)
        for name, value in (metrics or {}).items():
            self._metrics.setdefault(name, []).append(value.detach() if isinstance(value, torch.Tensor) else value)
        return (loss, outputs) if return_outputs else loss

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        bare = self.bare_model()
        if not class_shards(bare):
            return super()._clip_grad_norm(model)
        clip_shards(bare, self._train.max_grad_norm)
        return self.accelerator.clip_grad_norm_(shared_parameters(bare), self._train.max_grad_norm)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        bare = self.bare_model()
        if grad_norm is None and class_shards(bare):
            grad_norm = self.accelerator.clip_grad_norm_(shared_parameters(bare), float("inf"))
        return super()._get_grad_norm(model, grad_norm)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not counted: Trainer's estimate walks all parameters at every step and knows nothing of towers."""
        return 0

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" not in logs:  # Trainer's summary at the end
            super().log(logs, start_time)
            return
        step = self.state.global_step
        grad_norm = logs.get("grad_norm")
        for what, value in (("loss is", logs["loss"]), ("norm of the gradients is", grad_norm)):
            if value is not None and not torch.isfinite(torch.as_tensor(value)):
                raise UserError(
                    f"The {what} {float(value)} at step {step}: lower the learning rate, raise train.warmup, or look "
                    "for broken samples. Checkpoints from before are kept."
                )
        samples = step * self._train.batch_size * self._train.grad_accum * max(1, self.args.world_size)
        metrics, speed = self._take_metrics(), self.throughput.take()
        rates = {f"lr/{part}": rate for part, rate in self.lr_used.items()}
        super().log({**logs, **rates, **metrics, **speed}, start_time)  # the trackers get all of it
        self._on_row(LogRow(step, logs["loss"], self.lr_used, self._clock.elapsed, samples, grad_norm, metrics, speed))

    def _take_metrics(self) -> dict[str, float]:
        """Means since the last call, over all processes."""
        mine = {name: (sum(float(v) for v in values), len(values)) for name, values in self._metrics.items()}
        self._metrics = {}
        everyone: list[Any] = [mine]
        if dist.is_initialized():
            everyone = [None] * dist.get_world_size()
            dist.all_gather_object(everyone, mine)  # names may differ: a batch without regions has no region metric
        sums: dict[str, tuple[float, int]] = {}
        for name, (total, count) in (item for one in everyone for item in one.items()):
            before = sums.get(name, (0.0, 0))
            sums[name] = before[0] + total, before[1] + count
        return {name: total / count for name, (total, count) in sums.items()}

    # ---- checkpoints ----

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Trainer's checkpoint, renamed to `step_N` once it is complete; the newest `KEPT_CHECKPOINTS` stay.

        Raises:
            UserError: weights that are not finite: no checkpoint is made of them.
        """
        self._refuse_broken_weights()
        written = Path(str(self.args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        try:
            self._write_checkpoint(model, trial, written)
        except Exception:
            if self.args.should_save:
                shutil.rmtree(written, ignore_errors=True)  # it may be what filled the disk
            raise

    def _write_checkpoint(self, model: nn.Module, trial: Any, written: Path) -> None:
        super()._save_checkpoint(model, trial)
        assert self.optimizer is not None
        save_shards(written / SHARDS_FOLDER, self.bare_model(), _inner(self.optimizer))
        if dist.is_initialized():
            dist.barrier()  # every process has written its random state
        if self.args.should_save:
            folder, step = Path(str(self.args.output_dir)), self.state.global_step
            final = folder / f"step_{step}"
            (written / CLOCK_FILE).write_text(json.dumps({"step": step, "elapsed": self._clock.elapsed}))
            write_digest(written)
            shutil.rmtree(final, ignore_errors=True)
            os.replace(written, final)
            sync(folder)
            steps = sorted(folder.glob("step_*"), key=lambda path: int(path.name.removeprefix("step_")))
            for old in steps[:-KEPT_CHECKPOINTS]:
                shutil.rmtree(old, ignore_errors=True)
        if dist.is_initialized():
            dist.barrier()

    def _refuse_broken_weights(self) -> None:
        """The loss of this step may be a number although its update has made the weights none."""
        bad = not all(
            bool(torch.isfinite(local_part(parameter)).all())
            for parameter in self.bare_model().parameters()
            if parameter.requires_grad
        )
        if dist.is_initialized():
            flag = torch.tensor(float(bad), device=self.args.device if dist.get_backend() == "nccl" else "cpu")
            dist.all_reduce(flag, dist.ReduceOp.MAX)
            bad = bool(flag)
        if bad:
            raise UserError(
                f"The weights are no longer finite after step {self.state.global_step}: lower the learning rate, or "
                "raise train.warmup. Checkpoints from before are kept."
            )

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Weights under their names in memory.

        `save_pretrained` writes LLaVA's tensors under older names by default, and Trainer's resume loads a file by the
        names in memory: it would restore nothing and go on with a warning.
        """
        if not self.args.should_save:
            return
        model, folder = self.bare_model(), Path(output_dir or str(self.args.output_dir))
        if self._left_out:
            folder.mkdir(parents=True, exist_ok=True)
            whole = model.state_dict() if state_dict is None else state_dict
            kept = {name: tensor for name, tensor in whole.items() if name not in self._left_out}
            save_torch_state_dict(kept, folder, max_shard_size=1 << 62)
        elif isinstance(model, PreTrainedModel):
            model.save_pretrained(folder, state_dict=state_dict, save_original_format=False)
        elif hasattr(model, "peft_config"):
            super()._save(output_dir, state_dict)
        else:
            folder.mkdir(parents=True, exist_ok=True)
            shards = class_shards(model)
            state = {name: tensor for name, tensor in model.state_dict().items() if name not in shards}
            save_torch_state_dict(state, folder, max_shard_size=1 << 62)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        assert self.optimizer is not None
        with without_shards(self.bare_model(), _inner(self.optimizer)):
            super()._save_optimizer_and_scheduler(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            assert self.optimizer is not None
            load_shards(Path(checkpoint) / SHARDS_FOLDER, self.bare_model(), _inner(self.optimizer))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        load_shards(Path(resume_from_checkpoint) / SHARDS_FOLDER, self.bare_model())

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """A resume that leaves weights out is an error (tied tensors are stored once and miss their other names)."""
        model = self.bare_model()
        tensors: dict[str, torch.Tensor] = dict(model.named_parameters(remove_duplicate=False))
        tensors |= dict(model.named_buffers(remove_duplicate=False))
        missing = set(load_result.missing_keys) - set(class_shards(model))  # those are in files of their own
        missing -= self._left_out
        restored = {tensor.data_ptr() for name, tensor in tensors.items() if name not in missing}
        lost = [name for name in missing if name not in tensors or tensors[name].data_ptr() not in restored]
        wrong = sorted(lost) + sorted(load_result.unexpected_keys)
        if wrong:
            raise UserError(
                f"The checkpoint does not fit the model ({len(lost)} tensors missing, "
                f"{len(load_result.unexpected_keys)} unknown, first {wrong[0]}): delete the run's checkpoints folder "
                "to start it again."
            )


def _inner(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Without what accelerate wraps around it."""
    return getattr(optimizer, "optimizer", optimizer)
