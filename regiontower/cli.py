"""The `regiontower` command: each subcommand parses its options and calls one public function.

Nothing heavy is imported here at the top: `regiontower --help` has to answer at once.
"""

import logging
import os
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from . import demo_commands, label_commands, measure_commands, model_commands, train_commands
from .options import Json, Out, Overwrite, report

app = typer.Typer(
    name="regiontower",
    help="Region-aware vision encoders for LLaVA-style multimodal LLMs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.command()
def quickstart(
    out: Out,
    minutes: Annotated[float, typer.Option(min=0.1, help="Minutes of training, both stages together.")] = 4.0,
    overwrite: Overwrite = False,
    json_: Json = False,
) -> None:
    """Scenes, align and instruct from the packaged tower, evaluation of three models, a report: on this machine."""
    from .quickstart import quickstart as run
    from .quickstart import results_table

    results = run(out, minutes=minutes, overwrite=overwrite)
    page = out / "report" / "index.html"
    report(results, json_, f"{results_table(results)}\n\nreport: {page}")


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
    report({"records": str(records), "count": count, "seed": seed, "preset": preset, "words": words}, json_)


@app.command()
def towers(json_: Json = False) -> None:
    """List the registered vision towers."""
    from .vision_towers.table import tower_rows, tower_table

    if json_:
        report({"towers": tower_rows()}, True)
    else:
        typer.echo(tower_table())


for commands in (label_commands, train_commands, measure_commands, model_commands, demo_commands):
    app.add_typer(commands.app)


# No --help of its own: after the name it is the benchmark's.
@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def bench(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="A file in benchmarks/, without .py.")],
) -> None:
    """Run a benchmark; `regiontower bench NAME --help` lists its options."""
    from .benchmarks import run_benchmark

    run_benchmark(name, context.args)


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
