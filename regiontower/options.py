"""What subcommands share: options that mean the same everywhere, and the way they report."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

Out = Annotated[Path, typer.Option("--out", help="Folder to write into.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line of stdout.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")]
Dtype = Annotated[str, typer.Option(help="auto (as saved), fp32, bf16 or fp16.")]
Quant = Annotated[str, typer.Option(help="none, or the language model's weights in int8 or nf4.")]
Sets = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the recipe.")]
Overwrite = Annotated[
    bool,
    typer.Option(
        "--overwrite",
        help="Begin again where a finished run or another one stands; an unfinished run of the same recipe goes on.",
    ),
]
Recipe = Annotated[str, typer.Argument(help="A YAML file, or the name of a packaged recipe.")]
RecordFormat = Annotated[
    str,
    typer.Option("--format", help="records, xywh_jsonl, coco, coco_panoptic, llava, refcoco or flickr30k."),
]
CacheDir = Annotated[
    Path | None,
    typer.Option("--cache-dir", help="Folder for decoded pixels, for later runs, too; in memory when absent."),
]
ImageRoot = Annotated[Path | None, typer.Option("--image-root", help="Folder that image paths start from.")]


def report(results: dict[str, Any], as_json: bool, text: str | None = None) -> None:
    """The JSON object alone as the last line of stdout, or something to read."""
    typer.echo(
        json.dumps(results, ensure_ascii=False)
        if as_json
        else text or json.dumps(results, indent=2, ensure_ascii=False)
    )
