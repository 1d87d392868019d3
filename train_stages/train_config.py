"""How long, how fast and how precisely a stage trains: the `train` block every recipe has."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class TrainConfig:
    """The `train` block of a recipe.

    At least one of `steps`, `epochs` and `minutes` is set; the first one reached ends the run.

    `batch_size` counts samples a process takes per forward; one optimizer step sees
    `batch_size * grad_accum * processes` samples. Learning rates are not here: each part of a model has its own, in
    the `lr` block of the stage.
    """

    steps: Annotated[int, Field(gt=0)] | None = None
    epochs: Annotated[float, Field(gt=0)] | None = None
    minutes: Annotated[float, Field(gt=0)] | None = (
        None  # wall time of training; a resumed run counts what it spent before
    )
    batch_size: Annotated[int, Field(gt=0)] = 8
    grad_accum: Annotated[int, Field(gt=0)] = 1
    # muon: Muon for hidden matrices, AdamW for all else. sgd is plain: no momentum.
    optimizer: Literal["adamw", "muon", "sgd"] = "adamw"
    muon_lr: Annotated[float, Field(gt=0)] = 1.0  # muon only: learning rate of its matrices, in units of their part's
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    betas: tuple[float, float] = (0.9, 0.999)  # adamw, also for what muon leaves to it
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.03  # share of the whole run
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0  # 0 = gradients are not clipped
    precision: Literal["fp32", "bf16"] = "fp32"  # bf16 = autocast around fp32 weights
    compile: bool = False  # the repeated blocks by torch.compile: slow to begin, then faster
    seed: int = 0
    save_steps: Annotated[int, Field(gt=0)] = 500
    log_steps: Annotated[int, Field(gt=0)] = 10
    workers: Annotated[int, Field(ge=0)] = 0  # data loading processes
    threads: Annotated[int, Field(gt=0)] | None = None  # torch threads; None leaves torch's own choice
    report_to: tuple[str, ...] = ()  # trackers of transformers: tensorboard, wandb, ...

    def __post_init__(self) -> None:
        if self.steps is None and self.epochs is None and self.minutes is None:
            raise ValueError("one of steps, epochs and minutes must be set")
