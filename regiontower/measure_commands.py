"""Subcommands that measure: models through lmms-eval, towers by probes and segmentation."""

from pathlib import Path
from typing import Annotated

import typer

from .options import CacheDir, Device, Dtype, ImageRoot, Json, Out, Quant, RecordFormat, report

app = typer.Typer()


@app.command("eval")
def evaluate(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...",
            help="A packaged name, run directory, checkpoint folder or hub id; several with --compare.",
        ),
    ],
    out: Out,
    suite: Annotated[
        str | None, typer.Option(help="grounding, ocr or general; without one, four tasks on one --data file.")
    ] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Ask several models the suite grounding: one table, paired intervals.")
    ] = False,
    data: Annotated[
        list[Path] | None,
        typer.Option(
            "--data", help="A file of region records; a suite takes several, and the word scenes for generated ones."
        ),
    ] = None,
    data_root: Annotated[
        Path | None,
        typer.Option("--data-root", help="Folder of benchmarks' files (docs/eval.md); else REGIONTOWER_DATA."),
    ] = None,
    tasks: Annotated[str, typer.Option(help="Comma separated names of tasks; all of them by default.")] = "",
    format_: RecordFormat = "records",
    image_root: ImageRoot = None,
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many rows a task.")] = None,
    through: Annotated[
        str | None,
        typer.Option(help="Another model class of lmms-eval: qwen2_5_vl, llava_hf, vllm, openai, ..."),
    ] = None,
    model_args: Annotated[
        str, typer.Option("--model-args", help="Its further model arguments: name=value,name=value.")
    ] = "",
    convention: Annotated[
        str | None, typer.Option(help="How that model says boxes: llava15, qwen2_5_vl, qwen3_vl or int1000.")
    ] = None,
    judge: Annotated[
        str | None,
        typer.Option(
            "--judge", metavar="URL", help="OpenAI-compatible endpoint that marks Ferret-Bench; off when absent."
        ),
    ] = None,
    judge_model: Annotated[str | None, typer.Option("--judge-model", help="The judge's name there.")] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    quant: Quant = "none",
    batch_size: Annotated[int, typer.Option(min=1)] = 16,
    json_: Json = False,
) -> None:
    """Grounding, referring, reading, counting and OCR, through lmms-eval."""
    from .eval.command import EvalChoices, run_eval

    choices = EvalChoices(
        out=out,
        suite=suite,
        compare=compare,
        data=tuple(data or ()),
        data_root=data_root,
        tasks=[name.strip() for name in tasks.split(",")] if tasks else None,
        format=format_,
        image_root=image_root,
        limit=limit,
        through=through,
        model_args=model_args,
        convention=convention,
        judge=judge,
        judge_model=judge_model,
        device=device,
        dtype=dtype,
        quant=quant,
        batch_size=batch_size,
    )
    report(run_eval(models, choices), json_)


@app.command()
def probe(
    tower: Annotated[str, typer.Argument(help="A packaged name, a run directory, a checkpoint folder or a hub id.")],
    data: Annotated[Path, typer.Option("--data", help="Region records that classifiers learn from.")],
    test: Annotated[
        Path | None, typer.Option("--test", help="Records they are tested on; by their split when absent.")
    ] = None,
    labels: Annotated[str, typer.Option(help="What a class is: category, tags or cluster.")] = "category",
    readout: Annotated[str, typer.Option(help="Comma separated: own, roi, value, map, crops.")] = "own",
    side: Annotated[int | None, typer.Option(min=1, help="Pixels of the input; the tower's own when absent.")] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Of a rice run's text centres, to read by them; of --lit-steps' text tower.")
    ] = None,
    lit_steps: Annotated[
        int | None, typer.Option(min=1, help="Train a text tower on the frozen regions for so many steps.")
    ] = None,
    train_regions: Annotated[
        int,
        typer.Option(min=1, help="About how many objects to learn from; of more, images are taken evenly."),
    ] = 30_000,
    detect_steps: Annotated[
        int | None, typer.Option(min=1, help="Train a detector on the frozen tokens for so many steps.")
    ] = None,
    protocol: Annotated[
        str | None, typer.Option(help="A COCO-box protocol over --data instead: clipself-macc or fgclip-acc.")
    ] = None,
    templates: Annotated[
        Path | None,
        typer.Option(
            help="Prompt templates, one a line with {} for the class; when absent its name alone, or with --protocol "
            "a short list of ours."
        ),
    ] = None,
    classes: Annotated[
        Path | None,
        typer.Option(help="Candidates of --protocol, one name a line; the records' own categories when absent."),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder for the figures as JSON, and pictures.")] = None,
    cache_dir: CacheDir = None,
    format_: RecordFormat = "records",
    image_root: ImageRoot = None,
    device: Device = "auto",
    json_: Json = False,
) -> None:
    """Measure the regions of a frozen tower: neighbours, linear classes, reading, and texts where it knows them."""
    from .eval.probe import (
        CocoBoxConfig,
        DetectConfig,
        LitConfig,
        ProbeConfig,
        classify_coco_boxes,
        coco_box_table,
        probe_table,
        read_templates,
    )
    from .eval.probe import probe as run
    from .vision_towers import UserError

    readouts = tuple(name.strip() for name in readout.split(","))
    known = {} if templates is None else {"templates": read_templates(templates)}
    if protocol is not None:
        if labels != "category" or any(given is not None for given in (test, tokenizer, lit_steps, detect_steps)):
            raise UserError("a protocol takes categories and learns nothing: --data and --readout are all it needs.")
        asked = CocoBoxConfig(protocol, readouts, side, classes=classes, **known)  # pyright: ignore
        found = classify_coco_boxes(tower, data, asked, out=out, format=format_, image_root=image_root, device=device)
        report(found, json_, coco_box_table(found))
        return
    if classes is not None:
        raise UserError("--classes names the candidates of a protocol; give --protocol, too.")
    lit = None if lit_steps is None else LitConfig(lit_steps)
    detect = None if detect_steps is None else DetectConfig(detect_steps)
    config = ProbeConfig(labels, readouts, side, train_regions, lit, detect, **known)  # pyright: ignore
    results = run(
        tower,
        data,
        test,
        out=out,
        tokenizer=tokenizer,
        config=config,
        format=format_,
        image_root=image_root,
        device=device,
        cache_dir=cache_dir,
    )
    report(results, json_, probe_table(results))


@app.command()
def segment(
    tower: Annotated[str, typer.Argument(help="A packaged name, a run directory, a checkpoint folder or a hub id.")],
    data: Annotated[Path, typer.Option("--data", help="Region records with masks that the head learns from.")],
    test: Annotated[
        Path | None, typer.Option("--test", help="Records it is tested on; by their split when absent.")
    ] = None,
    task: Annotated[str, typer.Option(help="semantic or panoptic.")] = "semantic",
    tuning: Annotated[str, typer.Option(help="What is tuned in the frozen tower: none, convpass or lora.")] = "none",
    steps: Annotated[int, typer.Option(min=0, help="Of training; 0: patches and texts are compared as they are.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Images a step.")] = 8,
    labels: Annotated[str, typer.Option(help="What a class is: category or tags.")] = "category",
    held_out: Annotated[str, typer.Option(help="Comma separated classes that training does not see.")] = "",
    background: Annotated[
        str | None, typer.Option(help="Class of unlabelled pixels, e.g. background; they are void when absent.")
    ] = None,
    side: Annotated[int | None, typer.Option(min=1, help="Pixels of the input; the tower's own when absent.")] = None,
    templates: Annotated[
        Path | None, typer.Option(help="Prompt templates, one a line with {} for the class; its name when absent.")
    ] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="Of the text tower that --lit-steps trains.")] = None,
    lit_steps: Annotated[
        int | None, typer.Option(min=1, help="Train a text tower on the frozen regions for so many steps first.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder for the figures, a picture and the head.")] = None,
    cache_dir: CacheDir = None,
    format_: RecordFormat = "records",
    image_root: ImageRoot = None,
    device: Device = "auto",
    json_: Json = False,
) -> None:
    """Segment with a frozen tower, a few tuned parameters and a head whose classes are texts: mIoU or PQ."""
    from .eval.probe import LitConfig, read_templates
    from .eval.segmentation import (
        SegmentConfig,
        SegmenterConfig,
        TrainConfig,
        measure_segmentation,
        segmentation_table,
    )

    given = {} if templates is None else {"templates": read_templates(templates)}
    config = SegmentConfig(
        SegmenterConfig(task, tuning),  # pyright: ignore
        TrainConfig(steps, batch_size),
        labels=labels,  # pyright: ignore
        held_out=tuple(name.strip() for name in held_out.split(",") if name.strip()),
        background=background,
        side=side,
        lit=None if lit_steps is None else LitConfig(lit_steps),
        **given,
    )
    results = measure_segmentation(
        tower,
        data,
        test,
        config=config,
        out=out,
        tokenizer=tokenizer,
        format=format_,
        image_root=image_root,
        device=device,
        cache_dir=cache_dir,
    )
    report(results, json_, segmentation_table(results))


@app.command("lmms-tasks")
def lmms_tasks(
    data: Annotated[Path | None, typer.Option("--data", help="Region records; generated scenes when absent.")] = None,
    tasks: Annotated[
        str, typer.Option(help="Comma separated; grounding, referring, reading and absent when absent.")
    ] = "",
    convention: Annotated[
        str | None,
        typer.Option(help="For a model that is not ours: llava15, qwen2_5_vl, qwen3_vl or int1000."),
    ] = None,
    format_: RecordFormat = "records",
    image_root: ImageRoot = None,
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many rows a task.")] = None,
) -> None:
    """Print the folder of our tasks, for `python -m lmms_eval --include_path`."""
    from .eval.conventions import convention as declared
    from .eval.task_folder import task_folder

    folder = task_folder(
        data,
        format=format_,
        image_root=image_root,
        limit=limit,
        tasks=[name.strip() for name in tasks.split(",")] if tasks else None,
        convention=None if convention is None else declared(convention),
    )
    typer.echo(str(folder))
