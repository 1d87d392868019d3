"""How long, how fast and how precisely a stage trains: the `train` block every recipe has."""

from __future__ import annotations

import difflib
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass


def _list_such_as(example: str) -> BeforeValidator:
    """In the words of a recipe, where a tuple is written as a list."""

    def check(value: Any) -> Any:
        if not isinstance(value, list | tuple):
            raise ValueError(f"a list is needed, such as {example}, and not {value!r}")
        return value

    return BeforeValidator(check)


def _known_tracker(name: str) -> str:
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK  # only where one is asked for

    if name not in INTEGRATION_TO_CALLBACK:
        near = difflib.get_close_matches(name, INTEGRATION_TO_CALLBACK, n=1)
        mend = f"the nearest is {near[0]}" if near else f"there are {', '.join(INTEGRATION_TO_CALLBACK)}"
        raise ValueError(f"{name!r} is no tracker of transformers; {mend}")
    return name


Beta = Annotated[float, Field(ge=0, lt=1)]
Tracker = Annotated[str, AfterValidator(_known_tracker)]


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class TrainConfig:
    """The `train` block of a recipe.

    At least one of `steps`, `epochs` and `minutes` is set; the first one reached ends the run.

    `batch_size` counts samples a process takes per forward; one optimizer step sees
    `batch_size * grad_accum * processes` samples. Learning rates are not here: each part of a model has its own, in
    the `lr` block of the stage.
    """

    steps: Annotated[int, Field(gt=0)] | None = None
    epochs: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    minutes: Annotated[float, Field(gt=0)] | None = (
        None  # wall time of training; a resumed run counts what it spent before
    )
    batch_size: Annotated[int, Field(gt=0)] = 8
    grad_accum: Annotated[int, Field(gt=0)] = 1
    # muon: Muon for hidden matrices, AdamW for all else. sgd is plain: no momentum.
    optimizer: Literal["adamw", "muon", "sgd"] = "adamw"
    muon_lr: Annotated[float, Field(gt=0)] = 1.0  # muon only: learning rate of its matrices, in units of their part's
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    # adamw, also for what muon leaves to it
    betas: Annotated[tuple[Beta, Beta], _list_such_as("[0.9, 0.999]")] = (0.9, 0.999)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.03  # share of the whole run
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0  # 0 = gradients are not clipped
    precision: Literal["fp32", "bf16"] = "fp32"  # bf16 = autocast around fp32 weights
    compile: bool = False  # the repeated blocks by torch.compile: slow to begin, then faster
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0  # numpy takes no other
    save_steps: Annotated[int, Field(gt=0)] = 500
    log_steps: Annotated[int, Field(gt=0)] = 10
    workers: Annotated[int, Field(ge=0)] = 0  # data loading processes
    threads: Annotated[int, Field(gt=0)] | None = None  # torch threads; None leaves torch's own choice
    # trackers of transformers: tensorboard, wandb, ...
    report_to: Annotated[tuple[Tracker, ...], _list_such_as("[tensorboard]")] = ()

    def __post_init__(self) -> None:
        if self.steps is None and self.epochs is None and self.minutes is None:
            raise ValueError("one of steps, epochs and minutes must be set")
