"""Subcommands that use a finished model: ask it, give it another tower, give it away."""

from pathlib import Path
from typing import Annotated, Any

import typer

from .options import Device, Dtype, Json, Out, Quant, Sets, report

app = typer.Typer()


@app.command()
def chat(
    image: Annotated[Path, typer.Argument(help="Any picture.")],
    question: Annotated[
        str, typer.Argument(help="With one <region> a box; appended when you give boxes and write none.")
    ],
    model: Annotated[str, typer.Option(help="nano, a run directory, a checkpoint folder or a hub id.")] = "nano",
    box: Annotated[
        list[str] | None, typer.Option(help="x1,y1,x2,y2 in pixels of the picture; repeat for more.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Write the picture with the boxes drawn on it.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    device: Device = "auto",
    dtype: Dtype = "auto",
    quant: Quant = "none",
    json_: Json = False,
) -> None:
    """Ask a question about a picture."""
    from .ask import ask_picture

    answer = ask_picture(
        model,
        image,
        question,
        box or [],
        out=out,
        max_new_tokens=max_new_tokens,
        device=device,
        dtype=dtype,
        quant=quant,
    )
    if json_:
        report(answer, True)
        return
    typer.echo(answer["answer"])
    for found in answer["boxes"]:
        typer.echo(
            "box " + ", ".join(f"{edge:.1f}" for edge in found["box_xyxy"]) + f"  score {found['score']:.2f}", err=True
        )


@app.command()
def swap(
    mllm: Annotated[
        str, typer.Argument(help="nano, a folder or hub id: Llava, LlavaNext, LlavaOnevision, VipLlava, RegionLlava.")
    ],
    tower: Annotated[str, typer.Option(help="A packaged name, a run directory, a checkpoint folder or a hub id.")],
    out: Out,
    feature_layer: Annotated[
        int | None, typer.Option(help="Hidden state for the language model; the tower's default when absent.")
    ] = None,
    image_size: Annotated[
        int | None, typer.Option(min=1, help="Pixels a side of the tower's input; its own when absent.")
    ] = None,
    keep_projector: Annotated[
        bool, typer.Option("--keep-projector", help="Keep the trained projector; the widths must match.")
    ] = False,
    dtype: Dtype = "auto",
    verify: Annotated[
        str, typer.Option(help="bytes, full (opens the result, too) or auto (full when it fits in memory).")
    ] = "auto",
    regions: Annotated[bool, typer.Option("--regions", help="Make a Llava or LlavaNext take boxes, too.")] = False,
    json_: Json = False,
) -> None:
    """Give a LLaVA another vision tower, prove the result, and say what it costs and what has to be trained."""
    from .mllm import swap_checkpoint, swap_table

    results = swap_checkpoint(
        mllm,
        tower,
        out,
        feature_layer=feature_layer,
        image_size=image_size,
        keep_projector=keep_projector,
        dtype=dtype,
        verify=verify,
        regions=regions,
    )
    report(results, json_, swap_table(results))


@app.command()
def export(
    source: Annotated[str, typer.Argument(help="A packaged name, a run directory, a checkpoint folder or a hub id.")],
    out: Out,
    form: Annotated[
        str, typer.Option("--as", help="remote-code (keeps all), native (a tower's ViT) or plain-llava (no regions).")
    ] = "remote-code",
    merge: Annotated[
        bool, typer.Option("--merge", help="Write a LoRA run and its base as one checkpoint, instead of --as.")
    ] = False,
    dtype: Annotated[str, typer.Option(help="Of --merge: auto (as the base is saved), fp32, bf16 or fp16.")] = "auto",
    license_: Annotated[
        str | None, typer.Option("--license", help="Of the weights, for the card: apache-2.0, ...")
    ] = None,
    push_to_hub: Annotated[
        str | None, typer.Option("--push-to-hub", metavar="OWNER/NAME", help="Upload the folder to this repository.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to upload to; the main branch when absent.")] = None,
    json_: Json = False,
) -> None:
    """Write a model with a card so that it opens without this package; upload it when asked to."""
    from .export import export_model

    report(
        export_model(
            source,
            out,
            form,
            merge=merge,
            dtype=dtype,
            license=license_,
            push_to=push_to_hub,
            private=private,
            revision=revision,
        ),
        json_,
    )


@app.command()
def check(
    source: Annotated[str, typer.Argument(help="A model, or a recipe of align or instruct (a YAML file or its name).")],
    sets: Sets = None,
    show_batch: Annotated[
        bool, typer.Option("--show-batch", help="Of a recipe: samples, what of them is learned, how long they are.")
    ] = False,
    json_: Json = False,
) -> None:
    """Look for what is wrong with a LLaVA or a recipe and no error message tells of; status 1 for an error."""
    from .mllm.check import check_model
    from .mllm.findings import count, errors_first
    from .mllm.findings import report as summary
    from .train_stages.check_recipe import check_recipe
    from .train_stages.recipe import packaged_recipes
    from .vision_towers import UserError

    is_recipe = source in packaged_recipes() or Path(source).suffix in (".yaml", ".yml")
    if show_batch and not is_recipe:
        raise UserError(f"--show-batch looks at the samples of a recipe, and {source} is none.")
    found = check_recipe(source, sets or ()) if is_recipe else check_model(source)
    batch: dict[str, Any] = {}
    if show_batch:
        from .train_stages.show_batch import look_at_samples, print_samples

        samples, more = look_at_samples(source, sets or ())
        print_samples(samples)
        found = errors_first([*found, *more])
        batch = {"batch": samples.as_dict()}
    report(summary(found) | batch, json_, "\n".join(finding.line() for finding in found) or "nothing found")
    if count(found, "error"):
        raise typer.Exit(1)
