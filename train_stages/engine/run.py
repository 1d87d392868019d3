"""One stage from a model and a dataset to a run directory."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence, Sized
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn
from transformers import TrainerCallback

from ...vision_towers.errors import UserError
from ..train_config import TrainConfig
from .arguments import decided_by_first, training_arguments
from .attention import attention_kernels, without_caches
from .audit import AuditResult
from .compiling import compiled_blocks
from .flow import StageFlow
from .held_out import HeldOut
from .interrupt import StageInterrupted, StopRequest
from .manifest import machine, parent_record, read_run, versions
from .matrix_units import NOTE, slow_bf16
from .parts import Part, apply_parts, part_rows, trainability_table
from .progress import ProgressReport
from .run_book import RunBook
from .run_dir import CHECKPOINTS, last_checkpoint, plan_run
from .run_log import EvalRow, LogRow
from .schedule import Clock, plan_steps
from .seeded_data import SeededCollate, SeededDataset
from .storage import storage_errors
from .streamed import SeededStream, StreamedDataset
from .throughput import CountWork, Throughput
from .trackers import check_trackers, tracker_callbacks
from .trainer import CLOCK_FILE, StageTrainer
from .whole_model import make_whole

_ENDLESS = 10**9  # Trainer wants a number of steps even where the clock ends the run


@dataclass(frozen=True)
class StageResult:
    """What a stage came to.

    Attributes:
        run_dir: holds the model files, recipe.yaml, stage.json, log.jsonl, eval.jsonl, loss.png and checkpoints/.
        steps: optimizer steps; seconds: training time, resumed runs included.
        final_loss: mean over the last tenth of the logged rows; None when nothing was logged.
        metrics: means of the model's own metrics over the same rows, and what was measured last on held-out data.
    """

    run_dir: Path
    steps: int
    seconds: float
    final_loss: float | None
    metrics: dict[str, float] = field(default_factory=dict)


def run_stage(
    *,
    model: nn.Module,
    parts: Sequence[Part],
    dataset: Any,
    collate: Callable[[list], Any],
    train: TrainConfig,
    run_dir: Path,
    recipe: object,
    stage: str,
    parents: Mapping[str, Path | str],
    data: Mapping[str, str],
    save: Callable[[Path], None],
    before_save: Callable[[], None] = lambda: None,
    held_out: HeldOut | None = None,
    on_batch: Callable[[dict[str, Any], float], dict[str, Any]] | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    count_work: CountWork | None = None,
    trained_only: bool = False,
    find_unused: bool = False,
    device: str = "auto",
    overwrite: bool = False,
) -> StageResult:
    """Train `model` in `run_dir`: start, resume what was interrupted there, or return a finished run at once.

    Args:
        model: its forward takes the batch as keyword arguments and returns an output with `loss` (mean over the batch)
            and, if it likes, `metrics: dict[str, float]`, which are averaged into the log.
        parts: every parameter belongs to exactly one; lr 0 freezes. Also sets `requires_grad`.
        dataset: map-style (items may use the global random generators: they are seeded per seed, epoch and index) or
            a `StreamedDataset`, whose items have the same right.
        collate: list of items -> dict of tensors.
        recipe: the resolved recipe (dataclass), written to recipe.yaml; a run resumes only with an equal one.
        stage: "pretrain", "pretrain-lm", "align", "instruct": what stage.json, the plot and the progress bar say.
        parents: role -> directory (or id) of the checkpoints this model was built from.
        data: name -> hash of the data.
        save: writes the final model (and processor) into the directory it is given; the files are then moved into
            `run_dir`, so that a crash leaves no half-written model there. It is called in the first process only.
        before_save: called in every process before `save`: what processes have to put together.
        held_out: what is measured during the run, and when; the figures go to eval.jsonl, the plot and, the last ones
            as `held_out_...`, to the result's metrics.
        on_batch: (batch, share of the run that lies behind) -> the batch that the model gets.
        count_work: what a batch takes, for tokens/s and MFU in the log; without it there are samples/s alone.
        trained_only: checkpoints hold what trains, and no frozen tensor: for adapters, whose `model` takes the rest
            from its parents.
        find_unused: some parameters that train may have no part in the loss, as a foreign tower's own head: DDP then
            looks for them at every step.
        device: auto, cpu, cuda or mps. Under torchrun every process runs this function; on CPU they talk over gloo.
        overwrite: remove the run that stands in `run_dir` first, unless it is this very run and not finished.

    Raises:
        UserError: bad parts, empty data, a run directory of another recipe or one that holds a parent, loss not
            finite, a disk that is full, a tracker that is not installed.
        AuditError: a part that should train did not move in step 1, or a frozen tensor did.
        StageInterrupted: SIGINT or SIGTERM; a checkpoint was written.
    """
    run_dir = Path(run_dir)
    check_trackers(train.report_to)
    if train.threads is not None:
        torch.set_num_threads(train.threads)
    samples = len(dataset) if isinstance(dataset, Sized) else None
    args = training_arguments(train, run_dir / CHECKPOINTS, samples, device, find_unused)
    args.ignore_data_skip = isinstance(dataset, StreamedDataset)  # it begins in the right place by itself
    console = Console(stderr=True, quiet=not args.should_log)
    known_parents = decided_by_first(args, lambda: {name: parent_record(path) for name, path in parents.items()})
    plan = decided_by_first(
        args,
        lambda: plan_run(
            run_dir,
            stage=stage,
            recipe=recipe,
            data=data,
            parents=known_parents,
            overwrite=overwrite,
            processes=args.world_size,
        ),
    )
    if plan.finished:
        console.print(f"{stage}: {run_dir} is finished; nothing to do.", markup=False, highlight=False, soft_wrap=True)
        return finished_result(run_dir)

    apply_parts(model, parts)
    console.print(trainability_table(model, parts))
    clock = Clock(plan_steps(train, samples, args.world_size), train.minutes * 60 if train.minutes else None)
    if plan.checkpoint is not None:
        saved = json.loads((plan.checkpoint / CLOCK_FILE).read_text(encoding="utf-8"))
        clock.tick(saved["step"], saved["elapsed"])
    args.max_steps = clock.steps or _ENDLESS

    book = RunBook(
        run_dir,
        {
            "stage": stage,
            "status": "running",
            "parents": known_parents,
            "data": dict(data),
            "versions": versions(),
            "machine": machine(args.device, args.world_size),
            "parts": [asdict(row) for row in part_rows(model, parts)],
            "audit": None,
        },
        clock,
        enabled=args.should_save,
    )
    book.open(recipe)
    report = ProgressReport(stage, clock, train.batch_size * train.grad_accum * args.world_size, console)
    for note in plan.notes:
        report.say(note)
    if slow_bf16(args.device, train.precision):
        report.say(NOTE)
    if plan.checkpoint is not None:
        report.say(f"resuming from step {clock.step}")

    def on_row(row: LogRow) -> None:
        book.row(row)
        report.logged(row)

    def on_audit(result: AuditResult) -> None:
        book.audit(result)
        if result.no_gradient:
            first = ", ".join(result.no_gradient[:3])
            report.say(f"{len(result.no_gradient)} trained tensors got no gradient in the first step: {first} ...")

    def on_eval(row: EvalRow) -> None:
        book.evaluated(row)
        found = "  ".join(f"{name} {value:.4g}" for name, value in row.figures.items())
        report.say(f"step {row.step}, held out: {found}")

    stop = StopRequest()
    flow = StageFlow(clock, stop, parts, on_audit, report.step, held_out, on_eval)
    if isinstance(dataset, StreamedDataset):
        dataset = SeededStream(dataset, train.seed)
    else:
        dataset = SeededDataset(dataset, train.seed)
    collate = SeededCollate(collate)
    compute = torch.bfloat16 if train.precision == "bf16" else torch.float32
    throughput = Throughput(clock.now, args.device, compute, count_work)
    trackers = tracker_callbacks(train.report_to, run_dir, clock.step) if args.should_log else []
    if trackers:
        args.report_to = [name for name in train.report_to if name != "tensorboard"]  # ours takes its place
    args.run_name = run_dir.name
    broken_disk = storage_errors(run_dir, lambda: last_checkpoint(run_dir))
    with without_caches(model):  # around the Trainer's beginning, which switches some off for good
        trainer = StageTrainer(
            model=model,
            args=args,
            train=train,
            parts=parts,
            clock=clock,
            dataset=dataset,
            collate=collate,
            on_batch=on_batch,
            callbacks=[flow, *callbacks, *trackers],
            on_row=on_row,
            throughput=throughput,
            trained_only=trained_only,
        )
        flow.trainer = trainer
        report.start()
        try:
            kernels = attention_kernels(args.device, train.precision)
            with broken_disk, stop, kernels, compiled_blocks(model, args.device, train.compile):
                if clock.done():  # it crashed between its last step and the saving of the model
                    trainer._load_from_checkpoint(str(plan.checkpoint))
                else:
                    trainer.train(resume_from_checkpoint=str(plan.checkpoint) if plan.checkpoint else None)
        finally:
            report.stop()
    if not clock.done() and flow.stopped:
        book.close("interrupted")
        stopped = f"stopped at {report.summary()}. The same command goes on from there."
        report.say(stopped)
        raise StageInterrupted(f"{stage} {stopped}")

    # Leave the model as it came: without accelerate's autocast around its forward.
    trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_fp32_wrapper=False)
    model.eval()
    make_whole(model, trainer.model_wrapped, trainer.accelerator, keep=args.should_save)
    before_save()
    if args.should_save:
        with storage_errors(run_dir, lambda: last_checkpoint(run_dir)):
            book.model(save)
            book.close("finished")
        report.say(f"done at {report.summary()}")
    trainer.accelerator.wait_for_everyone()
    return finished_result(run_dir)


def finished_result(run_dir: Path) -> StageResult:
    """The result of a finished run, read from its stage.json.

    Raises:
        UserError: there is no finished run.
    """
    stage = read_run(run_dir)
    if stage is None or stage["status"] != "finished":
        raise UserError(f"{run_dir} holds no finished run.")
    return StageResult(run_dir, stage["steps"], stage["seconds"], stage["final_loss"], stage["metrics"])
