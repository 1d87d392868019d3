"""The `regiontower` command: each subcommand parses its options and calls one public function.

Nothing heavy is imported here at the top: `regiontower --help` has to answer at once.
"""

import importlib
import json
import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

app = typer.Typer(
    name="regiontower",
    help="Region-aware vision encoders for LLaVA-style multimodal LLMs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Out = Annotated[Path, typer.Option("--out", help="Folder to write into.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line of stdout.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")]
Dtype = Annotated[str, typer.Option(help="auto (as saved), fp32, bf16 or fp16.")]
Sets = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the recipe.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Start again where a run of another recipe stands.")]
Recipe = Annotated[str, typer.Argument(help="A YAML file, or the name of a packaged recipe.")]
RecordFormat = Annotated[str, typer.Option("--format", help="records, xywh_jsonl, coco or llava.")]
ImageRoot = Annotated[Path | None, typer.Option("--image-root", help="Folder that image paths start from.")]


@app.command()
def quickstart(
    out: Out,
    minutes: Annotated[float, typer.Option(min=0.1, help="Minutes of training, shared by the four stages.")] = 4.0,
    json_: Json = False,
) -> None:
    """Scenes -> tower -> language model -> align -> instruct -> evaluation -> a report, on this machine."""
    from .quickstart import quickstart as run

    results = run(out, minutes=minutes)
    report = out / "report" / "index.html"
    _report(results, json_, f"report: {report}")


@app.command()
def scenes(
    out: Annotated[Path, typer.Argument(help="Folder to write images/ and records.jsonl into.")],
    count: Annotated[int, typer.Option(min=1, help="How many scenes.")] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the first; from 1,000,000 on they are for evaluation.")] = 0,
    preset: Annotated[str, typer.Option(help="Name of a preset.")] = "default",
    words: Annotated[str, typer.Option(help="seen, or unseen: the 50 held-out words.")] = "seen",
    json_: Json = False,
) -> None:
    """Generate scenes: pictures in which every box, mask, phrase and text is known."""
    from .train_stages.scenes import write_scenes

    records = write_scenes(out, count, seed, preset=preset, words=words)
    _report({"records": str(records), "count": count, "seed": seed, "preset": preset, "words": words}, json_)


@app.command()
def towers(json_: Json = False) -> None:
    """List the registered vision towers."""
    from .vision_towers.table import tower_rows, tower_table

    if json_:
        _report({"towers": tower_rows()}, True)
    else:
        typer.echo(tower_table())


def _stage_command(
    name: str, module: str, recipe_class: str, function: str, help_text: str, recipe_module: str = ""
) -> None:
    """Add a training stage: all four read a recipe and give it to one function of `train_stages`."""

    @app.command(name, help=help_text)
    def stage(
        recipe: Recipe,
        out: Out,
        sets: Sets = None,
        device: Device = "auto",
        overwrite: Overwrite = False,
        json_: Json = False,
    ) -> None:
        from .train_stages.recipe import load_recipe

        found = importlib.import_module(f".train_stages.{module}", __package__)
        kinds = importlib.import_module(f".train_stages.{recipe_module or module}", __package__)
        resolved = load_recipe(recipe, getattr(kinds, recipe_class), sets or ())
        result = getattr(found, function)(resolved, out, device, overwrite=overwrite)
        _report(
            {
                "run_dir": str(result.run_dir),
                "steps": result.steps,
                "seconds": round(result.seconds, 1),
                "final_loss": result.final_loss,
                "metrics": result.metrics,
            },
            json_,
        )


_stage_command(
    "pretrain", "pretrain", "PretrainRecipe", "pretrain",
    "Stage 0: train a vision tower on region records (RICE, CLOC, UMG-CLIP), or on captions (CLIP).", "pretrain_recipe",
)  # fmt: skip
_stage_command(
    "pretrain-lm", "pretrain_lm", "LMRecipe", "pretrain_lm",
    "Stage 0b: train a small language model on the text of region records.",
)  # fmt: skip
_stage_command(
    "align", "mllm_stage", "AlignRecipe", "align",
    "Stage 1: put a tower and a language model together and train the projectors.",
)  # fmt: skip
_stage_command(
    "instruct", "mllm_stage", "InstructRecipe", "instruct",
    "Stage 2: instruction tuning of an aligned model.",
)  # fmt: skip


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Argument(help="A run directory, checkpoint folder or hub id.")],
    data: Annotated[Path, typer.Option("--data", help="A file of region records.")],
    out: Out,
    tasks: Annotated[
        str, typer.Option(help="Comma separated: grounding, referring, reading, absent; all of them by default.")
    ] = "",
    format_: RecordFormat = "records",
    image_root: ImageRoot = None,
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many rows a task.")] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    batch_size: Annotated[int, typer.Option(min=1)] = 16,
    json_: Json = False,
) -> None:
    """Grounding, referring and reading on region records, through lmms-eval."""
    from .eval.run import evaluate as run

    result = run(
        model,
        data,
        [name.strip() for name in tasks.split(",")] if tasks else None,
        out,
        format=format_,
        image_root=image_root,
        limit=limit,
        device=device,
        dtype=dtype,
        batch_size=batch_size,
    )
    _report({"tasks": result.tasks, "out": str(result.out)}, json_)


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
    detect_steps: Annotated[
        int | None, typer.Option(min=1, help="Train a detector on the frozen tokens for so many steps.")
    ] = None,
    protocol: Annotated[
        str | None, typer.Option(help="A COCO-box protocol over --data instead: clipself-macc or fgclip-acc.")
    ] = None,
    templates: Annotated[
        Path | None, typer.Option(help="Prompt templates of --protocol, one a line; a short list of ours when absent.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder for the figures as JSON, and pictures.")] = None,
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
    if protocol is not None:
        if labels != "category" or any(given is not None for given in (test, tokenizer, lit_steps, detect_steps)):
            raise UserError("a protocol takes categories and learns nothing: --data and --readout are all it needs.")
        known = {} if templates is None else {"templates": read_templates(templates)}
        asked = CocoBoxConfig(protocol, readouts, side, **known)  # pyright: ignore
        found = classify_coco_boxes(tower, data, asked, out=out, format=format_, image_root=image_root, device=device)
        _report(found, json_, coco_box_table(found))
        return
    if templates is not None:
        raise UserError("prompt templates belong to a protocol; give --protocol, too.")
    lit = None if lit_steps is None else LitConfig(lit_steps)
    detect = None if detect_steps is None else DetectConfig(detect_steps)
    config = ProbeConfig(labels, readouts, side, lit=lit, detect=detect)  # pyright: ignore
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
    )
    _report(results, json_, probe_table(results))


@app.command("lmms-tasks")
def lmms_tasks(
    data: Annotated[Path | None, typer.Option("--data", help="Region records; generated scenes when absent.")] = None,
    format_: RecordFormat = "records",
    image_root: ImageRoot = None,
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many rows a task.")] = None,
) -> None:
    """Print the folder of our tasks, for `python -m lmms_eval --include_path`."""
    from .eval.task_folder import task_folder

    typer.echo(str(task_folder(data, format=format_, image_root=image_root, limit=limit)))


@app.command()
def chat(
    image: Annotated[Path, typer.Argument(help="Any picture.")],
    question: Annotated[
        str, typer.Argument(help="With one <region> a box; appended when you give boxes and write none.")
    ],
    model: Annotated[str, typer.Option(help="A run directory, checkpoint folder or hub id.")],
    box: Annotated[
        list[str] | None, typer.Option(help="x1,y1,x2,y2 in pixels of the picture; repeat for more.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Write the picture with the boxes drawn on it.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    device: Device = "auto",
    dtype: Dtype = "auto",
    json_: Json = False,
) -> None:
    """Ask a question about a picture."""
    from .ask import ask_picture

    answer = ask_picture(
        model, image, question, box or [], out=out, max_new_tokens=max_new_tokens, device=device, dtype=dtype
    )
    if json_:
        _report(answer, True)
        return
    typer.echo(answer["answer"])
    for found in answer["boxes"]:
        typer.echo(
            "box " + ", ".join(f"{edge:.1f}" for edge in found["box_xyxy"]) + f"  score {found['score']:.2f}", err=True
        )


# No --help of its own: after the name it is the benchmark's.
@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def bench(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="A file in benchmarks/, without .py.")],
) -> None:
    """Run a benchmark; `regiontower bench NAME --help` lists its options."""
    from .benchmarks import run_benchmark

    run_benchmark(name, context.args)


def _report(results: dict[str, Any], as_json: bool, text: str | None = None) -> None:
    """The JSON object alone as the last line of stdout, or something to read."""
    typer.echo(
        json.dumps(results, ensure_ascii=False)
        if as_json
        else text or json.dumps(results, indent=2, ensure_ascii=False)
    )


def main() -> NoReturn:
    """Run the command. A user's mistake is one line on stderr and status 1; a bug keeps its traceback."""
    # Set before transformers is imported: its bars and notices would stand between our lines.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it mentions an optional package at import
    try:
        app()
    except Exception as error:
        errors = sys.modules.get("regiontower.vision_towers.errors")
        if errors is None or not isinstance(error, errors.UserError):
            raise
        print(f"regiontower: {error}", file=sys.stderr)
        sys.exit(1)
    sys.exit(0)
