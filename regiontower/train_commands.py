"""Subcommands that train: one for each stage, each with a recipe."""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from .options import Device, ImageRoot, Json, Out, Overwrite, Recipe, RecordFormat, Sets, report

app = typer.Typer()


def _stage_command(
    name: str,
    module: str,
    recipe_class: str,
    function: str,
    help_text: str,
    recipe_module: str = "",
    hand_in: Callable[[Any], dict[str, Any]] = lambda recipe: {},
) -> None:
    """Add a training stage: all four read a recipe and give it to one function of `train_stages`.

    hand_in: recipe -> more arguments, of what training may not import.
    """

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
        result = getattr(found, function)(resolved, out, device, overwrite=overwrite, **hand_in(resolved))
        report(
            {
                "run_dir": str(result.run_dir),
                "steps": result.steps,
                "seconds": round(result.seconds, 1),
                "final_loss": result.final_loss,
                "metrics": result.metrics,
            },
            json_,
        )


def _probe_of(recipe: Any) -> dict[str, Any]:
    """The measure of regions during `pretrain`."""
    from .eval.probe import neighbours_during

    return {"probe": neighbours_during(recipe.data.object_labels)} if recipe.eval.records is not None else {}


_stage_command(
    "pretrain", "pretrain", "PretrainRecipe", "pretrain",
    "Stage 0: train a vision tower on region records (RICE, CLOC, UMG-CLIP), or on captions (CLIP).", "pretrain_recipe",
    _probe_of,
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


@app.command()
def instructions(
    records: Annotated[Path, typer.Argument(help="Region records, or a file of --format.")],
    out: Annotated[Path, typer.Option("--out", help="JSONL to write.")],
    format_: RecordFormat = "records",
    image_root: ImageRoot = None,
    layout: Annotated[str, typer.Option(help="swift (boxes as numbers) or llava (boxes in the text).")] = "swift",
    boxes: Annotated[str, typer.Option(help="Convention of the boxes in the text, for llava.")] = "norm01",
    per_image: Annotated[int, typer.Option(min=1, help="Conversations an image.")] = 1,
    turns: Annotated[int, typer.Option(min=1, help="Most turns a conversation.")] = 6,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    json_: Json = False,
) -> None:
    """Write region records down as instruction data for other trainers; align and instruct read records themselves."""
    from .train_stages.record_io import read_records
    from .train_stages.region_instructions import write_instructions

    read = read_records(records, format_, image_root)
    which: Any = layout  # checked there
    found = write_instructions(read, out, layout=which, boxes=boxes, per_image=per_image, turns=turns, seed=seed)
    kinds = {"conversations": found.conversations, "kinds": found.kinds, "without": found.without}
    report({"out": str(found.path), **kinds}, json_)
