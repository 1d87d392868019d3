"""What happens between the steps of a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainingArguments

from .audit import AuditResult, MoveAudit
from .held_out import HeldOut
from .interrupt import StopRequest
from .parts import Part
from .run_log import EvalRow
from .schedule import Clock
from .seeded_data import generators_put_back
from .trainer import StageTrainer


class StageFlow(TrainerCallback):
    """Everything that happens between steps: clock, stop, check after step 1, epoch of the data, held-out figures."""

    def __init__(
        self,
        clock: Clock,
        stop: StopRequest,
        parts: Sequence[Part],
        on_audit: Callable[[AuditResult], None],
        on_step: Callable[[], None],
        held_out: HeldOut | None = None,
        on_eval: Callable[[EvalRow], None] = lambda row: None,
    ) -> None:
        self._clock, self._stop, self._parts = clock, stop, parts
        self._on_audit, self._on_step = on_audit, on_step
        self._held_out, self._on_eval = held_out, on_eval
        self._audit: MoveAudit | None = None
        self.stopped = False  # from outside, by a signal
        self.trainer: StageTrainer | None = None  # set once it exists; Trainer takes its callbacks first

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.trainer is not None
        if not self.trainer.is_deepspeed_enabled:  # it keeps gradients and weights where nobody else sees them
            self._audit = MoveAudit(self.trainer.bare_model(), self._parts)
        self.trainer.throughput.start()
        self._clock.start()

    def on_epoch_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.trainer is not None
        self.trainer.begin_epoch(int(state.epoch or 0))

    def on_optimizer_step(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.trainer is not None
        step = state.global_step + 1  # Trainer counts it after the scheduler's step, which already needs the clock
        elapsed, stopping = self._clock.now(), float(self._stop.requested)
        if args.world_size > 1:  # all processes must take the same learning rate and stop at the same step
            shared = torch.tensor([elapsed, stopping], dtype=torch.float64, device=_reduce_device(args))
            dist.all_reduce(shared, dist.ReduceOp.MAX)
            elapsed, stopping = shared.tolist()
        self._clock.tick(step, elapsed)
        self.stopped = bool(stopping)
        self.trainer.note_learning_rates()
        if self._audit is not None and (result := self._audit.check(step)) is not None:
            self._audit = None
            self._on_audit(result)

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> Any:
        if self.stopped or self._clock.done():
            control.should_training_stop = control.should_save = True
        if control.should_save:
            control.should_log = True  # the mean loss since the last row is not part of a checkpoint
        self._on_step()
        if self._held_out is not None and self._held_out.due(self._clock.step, self._clock.done()):
            self._evaluate(self._held_out)
        return control

    def _evaluate(self, held_out: HeldOut) -> None:
        """As if nothing had happened: neither the clock nor the random generators move."""
        assert self.trainer is not None
        model = self.trainer.bare_model()
        with self._clock.pause(), generators_put_back():
            model.eval()  # the next training step puts it back
            figures = held_out.measure()
        self._on_eval(EvalRow(self._clock.step, round(self._clock.elapsed, 3), figures))


def _reduce_device(args: TrainingArguments) -> torch.device:
    return args.device if dist.get_backend() == "nccl" else torch.device("cpu")
