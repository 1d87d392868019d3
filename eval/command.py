"""What `regiontower eval` does with its options: one file, a suite, or a comparison."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..vision_towers.errors import UserError
from .judge import Judge
from .task_folder import require_lmms_eval

if TYPE_CHECKING:
    from .opened import Model, Opening

SUITES = ("grounding", "ocr", "general")


@dataclass(frozen=True)
class EvalChoices:
    """The options of the command; see `regiontower eval --help`."""

    out: Path
    suite: str | None = None
    compare: bool = False
    data: tuple[Path, ...] = ()
    data_root: Path | None = None
    tasks: list[str] | None = None
    format: str = "records"
    image_root: Path | None = None
    limit: int | None = None
    through: str | None = None
    model_args: str = ""
    convention: str | None = None
    judge: str | None = None
    judge_model: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    quant: str = "none"
    batch_size: int = 16

    @property
    def opening(self) -> Opening:
        """How models are opened."""
        from .opened import Opening

        return Opening(self.device, self.dtype, self.quant, self.batch_size)


def run_eval(models: Sequence[str], choices: EvalChoices) -> dict[str, Any]:
    """Run what the options say and return what the command reports: figures and where the files are.

    Raises:
        UserError: options that do not go together, or whatever the evaluation refuses.
    """
    _check(models, choices)
    require_lmms_eval()
    opened = [_model(name, choices) for name in models]
    if choices.compare:
        from .compare import COMPARISON_NAME, compare

        found = compare(opened, choices.out, _grounding_data(choices), judge=_judge(choices), how=choices.opening)
        short = {name: found.results[name] for name in ("base", "cost", "differences")}
        tasks = {label: result.tasks for label, result in found.models.items()}
        return {"tasks": tasks, **short, "out": str(choices.out), "file": COMPARISON_NAME}
    if choices.suite == "grounding":
        from .grounding_suite import run_grounding_suite

        suite = run_grounding_suite(
            opened[0], choices.out, _grounding_data(choices), judge=_judge(choices), how=choices.opening
        )
        return {"tasks": suite.tasks, "skipped": suite.results["skipped"], "out": str(suite.out)}
    if choices.suite is not None:
        from .suite_run import evaluate_suite

        built_in = evaluate_suite(
            opened[0],
            choices.suite,
            choices.out,
            data_root=choices.data_root,
            tasks=choices.tasks,
            limit=choices.limit,
            how=choices.opening,
        )
        if built_in is None:  # not the first process of torchrun
            return {"out": str(choices.out)}
        return {"tasks": built_in.tasks, "out": str(built_in.out)}
    from .run import evaluate

    result = evaluate(
        opened[0],
        choices.data[0],
        choices.tasks,
        choices.out,
        format=choices.format,
        image_root=choices.image_root,
        limit=choices.limit,
        device=choices.device,
        dtype=choices.dtype,
        quant=choices.quant,
        batch_size=choices.batch_size,
    )
    return {"tasks": result.tasks, "out": str(result.out)}


def _check(models: Sequence[str], choices: EvalChoices) -> None:
    if choices.suite is not None and choices.suite not in SUITES:
        raise UserError(f"there is no suite {choices.suite!r}; choose from {', '.join(SUITES)}.")
    if choices.compare and choices.suite not in (None, "grounding"):
        raise UserError(f"--compare asks the suite grounding; it cannot ask {choices.suite}.")
    if len(models) > 1 and not choices.compare:
        raise UserError(f"{len(models)} models were given; --compare asks them all the same questions.")
    if choices.suite is None and not choices.compare and len(choices.data) != 1:
        raise UserError(
            f"give one file with --data (there are {len(choices.data)}), or --suite {', --suite '.join(SUITES)}."
        )
    if choices.suite in ("ocr", "general") and choices.data:
        raise UserError(
            f"the suite {choices.suite} has data of its own; give their folder with --data-root, not --data."
        )
    if choices.through is None and (choices.model_args or choices.convention):
        raise UserError("--model-args and --convention are for a model class of lmms-eval; name it with --through.")
    if choices.through is not None and choices.quant != "none":
        raise UserError("--quant is for our own models; quantise another class by its --model-args.")
    if (choices.judge is None) != (choices.judge_model is None):
        raise UserError("--judge URL and --judge-model NAME go together.")
    if choices.judge is not None and choices.suite != "grounding" and not choices.compare:
        raise UserError("--judge marks the answers of Ferret-Bench, which is in --suite grounding.")


def _grounding_data(choices: EvalChoices):
    from .grounding_suite import GroundingData

    return GroundingData(
        choices.data, choices.data_root, choices.tasks, choices.format, choices.image_root, choices.limit
    )


def _judge(choices: EvalChoices) -> Judge | None:
    return None if choices.judge is None or choices.judge_model is None else Judge(choices.judge, choices.judge_model)


def _model(name: str, choices: EvalChoices) -> Model:
    if choices.through is None:
        return name
    from .conventions import convention_of
    from .foreign import ForeignModel, model_class

    takes = inspect.signature(model_class(choices.through).__init__).parameters
    key = next((key for key in ("pretrained", "model", "model_version") if key in takes), "pretrained")
    arguments = ",".join(filter(None, [f"{key}={name}", choices.model_args]))
    return ForeignModel(choices.through, arguments, convention_of(choices.through, choices.convention))
